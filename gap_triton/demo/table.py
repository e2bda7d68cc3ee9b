"""The table of the demo: accuracy, prefill time and cache size of each way to prune, all measured in one run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

import gap_triton

from .. import GapConfig
from ..arguments import CACHE
from ..clock import seconds
from ..config import BEFORE_THE_DECODER, Stage
from .architecture import VISUAL
from .grounding import prepare
from .scenes import Scenes

IOU_THRESHOLD = 0.5  # the threshold of RefCOCO accuracy
UNPRUNED = GapConfig(keep=1.0, layer=0)
NO_PRUNING = "no pruning"

PREFILL_BATCH = 32
PREFILL_ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """One way to prune.

    Attributes:
        method: What the table calls it.
        keep: The budget; of several stages what the method calls its budget.
        config: What is done.
    """

    method: str
    keep: float | int
    config: GapConfig

    @classmethod
    def of(cls, config: GapConfig) -> Case:
        """Return ``config`` under a name made of its layer and its score.

        Raises:
            ValueError: ``keep`` is ``"outliers"``, which is no budget.
        """
        if isinstance(config.keep, str):
            raise ValueError(f"keep={config.keep!r}: expected a budget, a share or a number of tokens")
        return cls(method_name(config), config.keep, config)

    @property
    def config_dict(self) -> dict[str, Any]:
        """The whole configuration, field by field, as it is read again from a results file."""
        return json.loads(json.dumps(asdict(self.config)))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: The embedded model, ``"llava"`` or ``"qwen2_5_vl"``.
        method: Score and place, such as ``"last_token, layer 1"``, or the name of a preset; ``"no pruning"`` for the first
            line.
        keep: The budget, a share or a number of visual tokens.
        ids: Position ids of the survivors.
        config: The whole configuration, field by field.
        tokens_kept: Visual tokens per image in the last decoder layer, of the sample with the most.
        tokens_mean: The same, mean over all decoder layers.
        accuracy: Share of answers with IoU >= 0.5.
        accuracy_low: Lower end of its 95% interval (Wilson).
        accuracy_high: Upper end.
        mean_iou: Mean IoU of answers with the true boxes.
        prefill_ratio: Time of a prefill, vision tower included, relative to no pruning: the median over paired rounds.
        kv_bytes: Bytes that the KV cache of one prompt takes after prefill, all layers.
    """

    model: str
    method: str
    keep: float | int
    ids: str
    config: dict[str, Any]
    tokens_kept: int
    tokens_mean: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    mean_iou: float
    prefill_ratio: float
    kv_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the row as it stands in ``results.json``."""
        return asdict(self)


@dataclass(frozen=True)
class Cost:
    """What a prefill takes; fields as in `Row`."""

    prefill_ratio: float
    kv_bytes: int
    tokens_kept: int
    tokens_mean: float


def place_name(layer: int) -> str:
    """Return how tables call the place at which tokens are dropped."""
    return "before the decoder" if layer == BEFORE_THE_DECODER else f"layer {layer}"


def method_name(config: GapConfig) -> str:
    """Return how tables call where and by what ``config`` prunes."""
    if config.changes_nothing:
        return NO_PRUNING
    return "; ".join(map(_stage_name, config.stages))


def _stage_name(stage: Stage) -> str:
    coverage = "" if stage.coverage == "topk" else f" by {stage.coverage}"
    coverage += "" if stage.exponent == 1.0 else f" ^ {stage.exponent:g}"
    merge = "" if stage.merge == "none" else f" + {stage.merge}"
    return f"{stage.score}{coverage}{merge}, {place_name(stage.layer)}"


@torch.no_grad()
def prefill_cost(model: Any, processor: Any, scenes: Scenes, configs: Sequence[GapConfig]) -> list[Cost]:
    """Return the prefill time of each configuration relative to the first, and what its cache holds.

    Configurations take turns inside each round, so that a machine whose speed drifts slows all of them alike.
    """
    inputs = prepare(processor, scenes).to(model.device)
    text = inputs["input_ids"].shape[1] - VISUAL
    times: list[list[float]] = [[] for _ in configs]
    caches: list[tuple[int, int, float]] = []
    for round_number in range(PREFILL_ROUNDS + 1):
        for config_times, config in zip(times, configs, strict=True):
            gap_triton.configure(model, config)
            cache = DynamicCache(config=model.config.get_text_config())
            call = partial(model, **inputs, **{CACHE: cache}, logits_to_keep=1)
            duration = seconds(call, model.device)
            if round_number:
                config_times.append(duration)
                continue
            # The first round warms up.
            size = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
            visual = [layer.keys.shape[-2] - text for layer in cache.layers]
            caches.append((size // len(scenes), visual[-1], statistics.fmean(visual)))
    ratios = [
        statistics.median(a / b for a, b in zip(config_times, times[0], strict=True))
        for config_times in times
    ]
    return [Cost(ratio, *cache) for ratio, cache in zip(ratios, caches, strict=True)]
