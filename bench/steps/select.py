"""Selection alone, the simplest kernel: right, and how long it takes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from bench import cuda, exact, operators, timing
from bench.outcome import Found
from bench.shapes import make_inputs
from bench.steps.settings import Settings


@torch.inference_mode()
def select(settings: Settings) -> Iterator[Found]:
    """Compare with the reference at every prompt, and time."""
    for case in settings.decoders:
        x = make_inputs(case, settings.dtype, settings.device)
        error = exact.check(operators.topk_indices, x)
        call = functools.partial(operators.topk_indices, x)
        graphs = cuda.is_cuda(settings.device)
        times = timing.in_turn({"": [call]}, settings.device, settings.budget_s, graphs)[""]
        yield {
            "case": str(case),
            "error": error,
            "us": round(timing.quantiles(times).median, 2),
            "mode": "graph" if graphs else "eager, on a CPU",
        }
