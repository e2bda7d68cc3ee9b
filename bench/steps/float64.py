"""Every operator at every named shape against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import exact, operators
from bench.outcome import Found, StepFailed
from bench.shapes import make_inputs
from bench.steps.settings import Settings
from bench.words import first_line, short


@torch.inference_mode()
def compare_with_float64(settings: Settings) -> Iterator[Found]:
    """Compare every operator on its default path with the reference in float64, at every named shape."""
    errors: list[float] = []
    wrong: list[str] = []
    groups = ((settings.decoders, operators.DECODER_CALLS), (settings.towers, operators.TOWER_CALLS))
    for cases, calls in groups:
        for number, case in enumerate(cases):
            both = settings.dtype != torch.float32 and number == 0
            for dtype in (settings.dtype, torch.float32) if both else (settings.dtype,):
                x = make_inputs(case, dtype, settings.device)
                found: dict[str, float] = {}
                for name, call in calls.items():
                    try:
                        found[name] = exact.check(call, x)
                    except Exception as error:  # one operator that fails must not hide the others
                        wrong.append(f"{name}, {case}, {short(dtype)}: {first_line(error)}")
                errors += found.values()
                yield {"case": str(case), "dtype": short(dtype), "errors": found}
                del x
    yield {"compared": len(errors), "largest_error": max(errors, default=None)}
    if wrong:
        raise StepFailed("; ".join(wrong))
