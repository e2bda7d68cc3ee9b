"""The table of the demo: accuracy, prefill time and cache size of each way to prune, all measured in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import gap_triton
from gap_triton import GapConfig
from gap_triton.demo.architecture import VISUAL
from gap_triton.demo.grounding import evaluate, prepare
from gap_triton.demo.scenes import Scenes

IOU_THRESHOLD = 0.5  # the threshold of RefCOCO accuracy
UNPRUNED = GapConfig(keep=1.0, layer=0)

PREFILL_BATCH = 32
PREFILL_ROUNDS = 7


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: Score and place, such as ``"last_token, layer 1"``; ``"no pruning"`` for the first line.
        keep: Share of visual tokens kept.
        ids: Position ids of the survivors.
        tokens_kept: Visual tokens kept per image.
        accuracy: Share of answers with IoU >= 0.5.
        accuracy_low: Lower end of its 95% interval (Wilson).
        accuracy_high: Upper end.
        mean_iou: Mean IoU of answers with the true boxes.
        prefill_ratio: Time of a prefill, vision tower included, relative to no pruning: the median over paired rounds.
        kv_bytes: Bytes that the KV cache of one prompt takes after prefill, all layers.
    """

    method: str
    keep: float
    ids: str
    tokens_kept: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    mean_iou: float
    prefill_ratio: float
    kv_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in ``results.json``."""
        return asdict(self)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share (95% by default); ``trials`` >= 1."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"successes={successes}, trials={trials}: expected 0 <= successes <= trials, and trials >= 1"
        )
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def method_name(config: GapConfig) -> str:
    """How the table calls where and by what ``config`` prunes."""
    if config.keep == 1.0:
        return "no pruning"
    place = "before the decoder" if config.layer < 0 else f"layer {config.layer}"
    return f"{config.score}, {place}"


def measure(
    model: Any,
    processor: Any,
    scenes: Scenes,
    configs: Sequence[GapConfig],
    *,
    batch_size: int = 64,
    progress: Callable[[str, int], object] = lambda name, done: None,
) -> tuple[list[Row], list[Tensor]]:
    """Evaluate ``model`` under each configuration, no pruning first.

    Args:
        model: An embedded model, under ``"gap_triton"``.
        processor: Its processor.
        scenes: Held-out scenes.
        configs: What to compare with no pruning.
        batch_size: Scenes per call of ``generate``.
        progress: Called with the row's name and the number of scenes done since the last call.

    Returns:
        The rows, no pruning first, and the IoU of every answer, [N] for each row.
    """
    everything = [UNPRUNED, *configs]
    ratios, sizes = prefill_cost(model, processor, scenes[:PREFILL_BATCH], everything)
    rows, all_ious = [], []
    for config, ratio, size in zip(everything, ratios, sizes, strict=True):
        gap_triton.configure(model, config)
        name = f"{method_name(config)}, keep {config.keep:.3g}, {config.ids}"
        ious = evaluate(model, processor, scenes, batch_size=batch_size, progress=partial(progress, name))
        hits = int((ious >= IOU_THRESHOLD).sum())
        low, high = wilson_interval(hits, len(ious))
        rows.append(
            Row(
                method=method_name(config),
                keep=float(config.keep),
                ids=config.ids,
                tokens_kept=config.count(VISUAL),
                accuracy=hits / len(ious),
                accuracy_low=low,
                accuracy_high=high,
                mean_iou=float(ious.mean()),
                prefill_ratio=ratio,
                kv_bytes=size,
            )
        )
        all_ious.append(ious)
    return rows, all_ious


@torch.no_grad()
def prefill_cost(
    model: Any, processor: Any, scenes: Scenes, configs: Sequence[GapConfig]
) -> tuple[list[float], list[int]]:
    """Prefill time of each configuration relative to the first, and cache bytes per prompt.

    Configurations take turns inside each round, so that a machine whose speed drifts slows all of them alike.
    """
    inputs = prepare(processor, scenes).to(model.device)
    times: list[list[float]] = [[] for _ in configs]
    sizes = [0] * len(configs)
    for round_number in range(PREFILL_ROUNDS + 1):
        for i, config in enumerate(configs):
            gap_triton.configure(model, config)
            cache = DynamicCache(config=model.config.get_text_config())
            prefill = partial(model, **inputs, past_key_values=cache, logits_to_keep=1)
            seconds = _timed(prefill, model.device)
            sizes[i] = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) // len(
                scenes
            )
            if round_number:  # the first round warms up
                times[i].append(seconds)
    ratios = [statistics.median(a / b for a, b in zip(own, times[0], strict=True)) for own in times]
    return ratios, sizes


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
