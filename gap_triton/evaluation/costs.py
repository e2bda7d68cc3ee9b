"""What a prefill takes in each way: time to the first token and bytes of the KV cache, in turns on the same questions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gap_triton

from ..latency.measure import seconds
from .asking import Asker, Batch
from .question import Question
from .ways import Way

QUESTIONS = 8  # that costs are measured on, one at a time
ROUNDS = 3  # after one that warms up


@dataclass(frozen=True)
class Cost:
    """Medians over questions and rounds.

    Attributes:
        ttft_s: Seconds of ``generate`` to the first token, vision encoder included, one question at a time.
        ttft_ratio: The same relative to the first way, within a round.
        kv_bytes: Keys and values of one prompt, all layers, mean over questions.
    """

    ttft_s: float
    ttft_ratio: float
    kv_bytes: int


def measure_costs(
    asker: Asker, questions: Sequence[Question], ways: Sequence[Way], progress: Callable[[int], object]
) -> list[Cost]:
    """Measure every way, taking turns within each round, so that a machine whose speed drifts slows all alike.

    Args:
        asker: The model.
        questions: The first `QUESTIONS` of them are used.
        ways: The first is what the others are relative to.
        progress: Called after every call with their number.
    """
    times: list[list[float]] = [[] for _ in ways]
    sizes: list[list[int]] = [[] for _ in ways]
    for question in questions[:QUESTIONS]:
        batch = asker.prepare([question])
        for round_number in range(ROUNDS + 1):
            for way, of_way, size in zip(ways, times, sizes, strict=True):
                gap_triton.configure(asker.model, way.config)
                if round_number == 0:  # warms up, and tells what does not change
                    size.append(_kv_bytes(asker, batch))
                else:
                    of_way.append(
                        seconds(lambda batch=batch: asker.generate(batch, 1), asker.model.device)  # type: ignore[misc]
                    )
                progress(1)
    return [
        Cost(
            ttft_s=statistics.median(of_way),
            ttft_ratio=statistics.median(a / b for a, b in zip(of_way, times[0], strict=True)),
            kv_bytes=round(statistics.fmean(size)),
        )
        for of_way, size in zip(times, sizes, strict=True)
    ]


def _kv_bytes(asker: Asker, batch: Batch) -> int:
    layers: Any = asker.generate(batch, 1).past_key_values.layers
    # Layers without attention, of hybrid decoders, hold no keys.
    tensors = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
