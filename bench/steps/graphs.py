"""Every operator captured in CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import cuda, exact, operators
from bench.operators import Call
from bench.outcome import Found, StepFailed
from bench.shapes import Case, Inputs, make_inputs
from bench.steps.settings import Settings
from bench.words import first_line


@torch.inference_mode()
def replay_graphs(settings: Settings) -> Iterator[Found]:
    """Every operator captured and replayed: on new values, and two graphs alternately on two streams."""
    cuda.require_cuda(settings.device, "a CUDA graph")
    wrong = []
    for name, call, case in settings.every_call():
        try:
            if not _replays(call, case, settings):
                wrong.append(f"{name}: a replay differs from the eager call")
            elif not _alternate(call, case, settings):
                wrong.append(f"{name}: two graphs on two streams disturb each other")
        except Exception as error:  # one operator that can't be captured must not hide the others
            wrong.append(f"{name}: {first_line(error)}")
    if wrong:
        raise StepFailed("; ".join(wrong))
    yield {"operators": [name for name, *_ in settings.every_call()], "replays_each": settings.repeats}


def _captured(call: Call, x: Inputs, device: torch.device) -> tuple[torch.cuda.CUDAGraph, operators.Result]:
    """A graph of one call, and the tensors that its replays write to."""
    results: list[operators.Result] = []
    graph = cuda.capture(lambda: results.append(call(x)), device)
    return graph, results[-1]


def _replays(call: Call, case: Case, settings: Settings) -> bool:
    """Whether replays on new input values, copied in place, equal eager calls on them."""
    x = make_inputs(case, settings.dtype, settings.device, seed=0)
    graph, result = _captured(call, x, settings.device)
    for seed in (1, 2, 0):
        fresh = make_inputs(case, settings.dtype, settings.device, seed)
        expected = call(fresh)
        for target, source in zip(x.tensors(), fresh.tensors(), strict=True):
            target.copy_(source)
        _poison(result)
        graph.replay()
        cuda.synchronize(settings.device)
        if int(exact.differing(result, expected)):
            return False
    return True


def _alternate(call: Call, case: Case, settings: Settings) -> bool:
    """Whether two graphs, replayed in turn on two streams without waiting, both keep giving their results."""
    inputs = [make_inputs(case, settings.dtype, settings.device, seed) for seed in (3, 4)]
    expected = [call(x) for x in inputs]
    captured = [_captured(call, x, settings.device) for x in inputs]
    wrong = [torch.zeros((), dtype=torch.int64, device=settings.device) for _ in inputs]
    cuda.synchronize(settings.device)
    streams = [torch.cuda.Stream(settings.device) for _ in inputs]
    for _ in range(settings.repeats):
        for i, (graph, result) in enumerate(captured):
            with torch.cuda.stream(streams[i]):
                _poison(result)
                graph.replay()
                wrong[i] += exact.differing(result, expected[i])
    cuda.synchronize(settings.device)
    return not any(int(count) for count in wrong)


def _poison(result: operators.Result) -> None:
    """Overwrite results, so that a replay which writes nothing can't pass."""
    for tensor in result:
        tensor.fill_(-77)
