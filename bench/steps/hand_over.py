"""The latency of one hand-over between two programs, which is the unit of the one launch's critical path."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from bench import cuda
from bench.outcome import Found
from bench.steps.settings import Settings

ROUNDS = 1000
REPEATS = 20
APART = 32
"""Counters between the two, so that each has a cache line of 128 bytes."""


def time_hand_over(settings: Settings) -> Iterator[Found]:
    """Let two programs wait for each other in turn: each announces what the other waits for."""
    cuda.require_cuda(settings.device, "a hand-over between programs that run at the same time")
    kernel = ping_pong()
    for warps in (4, 8):
        counter = torch.zeros(2 * APART, dtype=torch.int32, device=settings.device)

        def launch(rounds: int, warps: int = warps, counter: torch.Tensor = counter) -> None:
            counter.zero_()
            kernel[(2,)](counter, rounds, APART, num_warps=warps, launch_cooperative_grid=True)

        launch(10)
        cuda.synchronize(settings.device)
        yield {"warps": warps, "calls": 1}
        times = []
        for _ in range(REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            launch(ROUNDS)
            end.record()
            cuda.synchronize(settings.device)
            times.append(begin.elapsed_time(end) * 1e3 / (2 * ROUNDS))
        yield {"warps": warps, "hand_over_us": round(statistics.median(times), 3)}


def ping_pong() -> Any:
    """The kernel; Triton is imported for this step only."""
    from bench.steps import ping_pong as kernels

    return kernels.ping_pong_kernel
