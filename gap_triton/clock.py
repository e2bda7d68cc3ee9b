"""The time that a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device; on a single thread of a CPU its own time only."""
    clock = clock_of(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def clock_of(device: torch.device) -> Callable[[], float]:
    """What tells the time: with a single thread, the time that this process had, as others may take some in between."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return time.perf_counter
