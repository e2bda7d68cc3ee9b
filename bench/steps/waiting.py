"""The one launch, whose programs wait for one another: by tickets, all at once, and on a device that others keep busy.

What can hang says where it is: one call, then a few, then thousands.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from bench import cuda, exact, operators
from bench.outcome import Found, StepFailed
from bench.prune_ways import in_one_launch, require_kernels, where_kernels_ran
from bench.shapes import Case, make_inputs
from bench.steps.settings import Settings

ROUNDS, ROUNDS_ON_A_CPU = (10, 1000), (2,)
CROWDED_ROUNDS, CROWDED_ROUNDS_ON_A_CPU = 200, 2
SIDE, SIDE_ON_A_CPU = 8192, 64
"""Of the matrix whose square other streams compute."""


def by_tickets(settings: Settings) -> Iterator[Found]:
    """Programs draw their numbers in the order in which they start."""
    yield from _prune(settings, settings.waiting, ticket=True)


def all_at_once(settings: Settings) -> Iterator[Found]:
    """Cooperative launches, of grids that fit."""
    yield from _prune(settings, settings.waiting[: settings.at_once], ticket=False)


@torch.inference_mode()
def _prune(settings: Settings, cases: tuple[Case, ...], ticket: bool) -> Iterator[Found]:
    require_kernels(settings.device)
    call = functools.partial(in_one_launch, ticket=ticket)
    path = where_kernels_ran(settings.device)
    for case in cases:
        x = make_inputs(case, settings.dtype, settings.device)
        first = call(x)
        cuda.synchronize(settings.device)
        yield {"case": str(case), "calls": 1, "path": path}
        error = exact.check(call, x, operators.prune_tokens)
        yield {"case": str(case), "error": error}
        for count in ROUNDS if cuda.is_cuda(settings.device) else ROUNDS_ON_A_CPU:
            wrong = torch.zeros((), dtype=torch.int64, device=settings.device)
            for _ in range(count):
                wrong += exact.differing(call(x), first)
            yield {"case": str(case), "calls": count, "wrong": int(wrong)}
            if int(wrong):
                raise StepFailed(f"{case}: {int(wrong)} elements differ from the first launch")


@torch.inference_mode()
def while_others_fill_the_device(settings: Settings) -> Iterator[Found]:
    """Prune on a stream for each prompt and way, while two other streams multiply large matrices."""
    require_kernels(settings.device)
    on_gpu = cuda.is_cuda(settings.device)
    work = [(case, True) for case in settings.waiting]
    work += [(case, False) for case in settings.waiting[: settings.at_once]]
    calls = []
    for case, ticket in work:
        x = make_inputs(case, settings.dtype, settings.device)
        call = functools.partial(in_one_launch, x, ticket=ticket)
        calls.append((call, call()))
    side = SIDE if on_gpu else SIDE_ON_A_CPU
    matrix = torch.randn(side, side, device=settings.device, dtype=settings.dtype)
    wrong = [torch.zeros((), dtype=torch.int64, device=settings.device) for _ in work]
    cuda.synchronize(settings.device)
    streams = [cuda.stream(settings.device) for _ in range(len(work) + 2)]

    rounds = CROWDED_ROUNDS if on_gpu else CROWDED_ROUNDS_ON_A_CPU
    for _ in range(rounds):
        for stream in streams[len(work) :]:
            with cuda.on_stream(stream):
                matrix @ matrix
        for i, (call, expected) in enumerate(calls):
            with cuda.on_stream(streams[i]):
                wrong[i] += exact.differing(call(), expected)
    cuda.synchronize(settings.device)
    counts = [int(count) for count in wrong]
    for (case, ticket), count in zip(work, counts, strict=True):
        yield {"case": str(case), "ticket": ticket, "rounds": rounds, "wrong": count}
    if not on_gpu:
        yield {"path": where_kernels_ran(settings.device), "streams": "none, the CPU has none"}
    if any(counts):
        raise StepFailed(f"{sum(counts)} elements differ from those of an idle device")
