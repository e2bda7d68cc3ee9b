"""Microseconds until the host has control again."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from bench import timing
from bench.outcome import Found
from bench.shapes import make_inputs
from bench.steps.settings import Settings


@torch.inference_mode()
def time_the_host(settings: Settings) -> Iterator[Found]:
    """Time each operator's call without waiting for the device."""
    times = {}
    for name, call, case in settings.every_call():
        x = make_inputs(case, settings.dtype, settings.device)
        bursts = max(settings.repeats // 2, 3)
        values = timing.host([functools.partial(call, x)], settings.device, bursts)
        times[name] = round(timing.quantiles(values).median, 1)
    yield {"host_us": times}
    yield {"operators": len(times), "slowest": max(times, key=lambda name: times[name])}
