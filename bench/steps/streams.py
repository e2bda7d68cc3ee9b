"""Every operator from several threads at once, each with a stream of its own."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import cuda, exact, operators
from bench.operators import Call
from bench.outcome import Found, StepFailed
from bench.shapes import Inputs, make_inputs
from bench.steps.settings import Settings


def run_on_streams(settings: Settings) -> Iterator[Found]:
    """Every operator from several threads at once, each with a stream of its own, against one stream's results."""
    calls = list(settings.every_call())
    work: list[list[tuple[str, Call, Inputs, operators.Result]]] = []
    with torch.inference_mode():
        for thread in range(settings.threads):
            x = {case: make_inputs(case, settings.dtype, settings.device, thread) for _, _, case in calls}
            work.append([(name, call, x[case], call(x[case])) for name, call, case in calls])
    cuda.synchronize(settings.device)

    def repeat(number: int) -> dict[str, int]:
        zero = torch.zeros((), dtype=torch.int64, device=settings.device)
        wrong = {name: zero.clone() for name, *_ in work[number]}
        with torch.inference_mode(), cuda.new_stream(settings.device):
            for _ in range(settings.repeats):
                for name, call, x, expected in work[number]:
                    wrong[name] = wrong[name] + exact.differing(call(x), expected)
            return {name: int(count) for name, count in wrong.items()}

    with ThreadPoolExecutor(settings.threads) as pool:
        # A thread starts with the default back end; the copied context hands on the one that is in force here.
        contexts = [contextvars.copy_context() for _ in work]
        counts = list(pool.map(lambda number: contexts[number].run(repeat, number), range(len(work))))
    yield {
        "threads": settings.threads,
        "streams": settings.threads if cuda.is_cuda(settings.device) else "none, the CPU has none",
        "calls": settings.threads * settings.repeats * len(calls),
    }
    differ = sorted({name for thread in counts for name, count in thread.items() if count})
    if differ:
        raise StepFailed(f"results differ from one stream's: {'; '.join(differ)}")
