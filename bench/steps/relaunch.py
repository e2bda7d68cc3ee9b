"""``prune_tokens`` launched again and again: counters must reset, bits must stay the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import exact, operators
from bench.outcome import Found, StepFailed
from bench.shapes import make_inputs
from bench.steps.settings import Settings

BURST = 10


@torch.inference_mode()
def relaunch(settings: Settings) -> Iterator[Found]:
    """Alternate between shapes; results of a burst are compared after it, on the device, and read once, at the end."""
    inputs = [make_inputs(case, settings.dtype, settings.device) for case in settings.alternating]
    for x in inputs:
        exact.check(operators.prune_tokens, x)
    first = [operators.prune_tokens(x) for x in inputs]
    wrong = torch.zeros((), dtype=torch.int64, device=settings.device)
    order = [i % len(inputs) for i in range(settings.relaunches)]
    for start in range(0, len(order), BURST):
        numbers = order[start : start + BURST]
        results = [operators.prune_tokens(inputs[i]) for i in numbers]
        for i, result in zip(numbers, results, strict=True):
            wrong += exact.differing(result, first[i])
    yield {"launches": len(order), "shapes": [str(case) for case in settings.alternating]}
    if int(wrong):
        raise StepFailed(f"{int(wrong)} elements differ from the first launch")
