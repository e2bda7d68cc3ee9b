"""Measuring the rows of a table: each configuration once, in whatever table it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

import gap_triton

from .. import GapConfig
from .grounding import batches_of, evaluate_batches
from .intervals import wilson_interval
from .log import Log
from .scenes import Scenes
from .table import IOU_THRESHOLD, PREFILL_BATCH, UNPRUNED, Case, Cost, Row, prefill_cost


def measure(
    model: Any,
    processor: Any,
    scenes: Scenes,
    cases: Sequence[Case],
    *,
    batch_size: int = 64,
    progress: Callable[[str, int], object] = lambda name, done: None,
    log: Log | None = None,
) -> tuple[list[Row], list[Tensor]]:
    """Evaluate ``model`` under each configuration, no pruning first.

    What ``log`` has measured already is not measured again, so one run of no pruning serves all tables. Prefill times are
    relative to no pruning, timed in turns with what is missing.

    Args:
        model: An embedded model, under ``"gap_triton"``.
        processor: Its processor.
        scenes: Held-out scenes.
        cases: What to compare with no pruning.
        batch_size: Scenes per call of ``generate``.
        progress: Called with the row's name and the number of scenes done since the last call.
        log: What has been measured before, and where to note what is measured now; None = nothing.

    Returns:
        The rows, no pruning first, and the IoU of every answer, [N] for each row.
    """
    everything = [Case.of(UNPRUNED), *cases]
    log = Log() if log is None else log
    model_type = model.config.model_type
    missing = [case.config for case in everything if log.find(model_type, case) is None]
    costs: dict[GapConfig, Cost] = {}
    batches = []
    if missing:
        timed = list(dict.fromkeys([UNPRUNED, *missing]))
        costs = dict(zip(timed, prefill_cost(model, processor, scenes[:PREFILL_BATCH], timed), strict=True))
        batches = list(batches_of(processor, scenes, model.device, batch_size))
    rows, all_ious = [], []
    for case in everything:
        name = f"{case.method}, keep {case.keep:.3g}, {case.config.ids}"
        known = log.find(model_type, case)
        if known is not None:
            progress(name, len(scenes))
        else:
            gap_triton.configure(model, case.config)
            ious = evaluate_batches(model, processor, batches, progress=partial(progress, name))
            known = _row_of(model_type, case, costs[case.config], ious), ious
            log.add(*known)
        rows.append(known[0])
        all_ious.append(known[1])
    return rows, all_ious


def _row_of(model_type: str, case: Case, cost: Cost, ious: Tensor) -> Row:
    hits = int((ious >= IOU_THRESHOLD).sum())
    low, high = wilson_interval(hits, len(ious))
    return Row(
        model=model_type,
        method=case.method,
        keep=case.keep,
        ids=case.config.ids,
        config=case.config_dict,
        accuracy=hits / len(ious),
        accuracy_low=low,
        accuracy_high=high,
        mean_iou=float(ious.mean()),
        **asdict(cost),
    )
