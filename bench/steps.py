"""The steps of ``gpu_check`` that run in its own process. Each takes the settings, returns what it found, or raises."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from gap_kernels.backends import use_triton

from bench import cuda, exact, floor, operators, timing
from bench.operators import Call
from bench.shapes import DECODERS, TINY_DECODER, TINY_TOWER, TOWERS, Case, Inputs, find, make_inputs

Found = dict[str, Any]


class StepFailed(Exception):
    """What is wrong, in words; ``found`` is reported beside it."""

    def __init__(self, message: str, found: Found | None = None) -> None:
        super().__init__(message)
        self.found = found or {}


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        device: Where.
        decoders: Prompts that results are compared on; the first also in float32.
        towers: Vision towers, likewise.
        small: Prompt that host times, streams and graphs are tried on.
        small_tower: Vision tower, likewise.
        relaunches: How often ``prune_tokens`` is launched again.
        alternating: The prompts it alternates between.
        repeats: Rounds of every operator per thread, and replays per graph.
        threads: Threads, with a stream each.
        budget_s: Seconds that one timing may take.
    """

    device: torch.device
    decoders: tuple[Case, ...] = (*(Case(shape, 1) for shape in DECODERS), Case(DECODERS[0], 8))
    towers: tuple[Case, ...] = tuple(Case(shape, 1) for shape in TOWERS)
    small: Case = field(default=Case(find("llava-1.5"), 1))
    small_tower: Case = field(default=Case(find("clip-336"), 1))
    relaunches: int = 10_000
    alternating: tuple[Case, ...] = (
        Case(find("llava-1.5"), 1),
        Case(find("llava-next"), 1),
        Case(find("llava-1.5"), 4),
        Case(TINY_DECODER, 2),
    )
    repeats: int = 50
    threads: int = 4
    budget_s: float = 0.1

    @property
    def dtype(self) -> torch.dtype:
        """What models run in: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if cuda.is_cuda(self.device) else torch.float32

    def every_call(self) -> Iterator[tuple[str, Call, Case]]:
        """Each operator with the small case that it is tried on."""
        for name, call in operators.DECODER_CALLS.items():
            yield name, call, self.small
        for name, call in operators.TOWER_CALLS.items():
            yield name, call, self.small_tower


def tiny(device: torch.device) -> Settings:
    """As little as every step can be run on."""
    decoder, tower = Case(TINY_DECODER, 2), Case(TINY_TOWER, 2)
    return Settings(
        device,
        decoders=(decoder,),
        towers=(tower,),
        small=decoder,
        small_tower=tower,
        relaunches=25,
        alternating=(decoder, Case(TINY_DECODER, 1)),
        repeats=2,
        threads=2,
        budget_s=0.005,
    )


def measure_machine(settings: Settings) -> Found:
    """Copy bandwidth, matrix rate and launch, as every floor uses them."""
    rates = floor.measure_rates(settings.device, settings.dtype)
    return {
        "copy_tb_per_s": rates.bytes_per_us / 1e6,
        "product_tflop_per_s": rates.flops_per_us / 1e6,
        "launch_us": rates.launch_us,
    }


@torch.inference_mode()
def compare_with_float64(settings: Settings) -> Found:
    """Every operator at every named shape, on its default path, against the reference in float64."""
    errors: dict[str, float] = {}
    wrong: list[str] = []
    groups = ((settings.decoders, operators.DECODER_CALLS), (settings.towers, operators.TOWER_CALLS))
    for cases, calls in groups:
        for number, case in enumerate(cases):
            both = settings.dtype != torch.float32 and number == 0
            for dtype in (settings.dtype, torch.float32) if both else (settings.dtype,):
                x = make_inputs(case, dtype, settings.device)
                for name, call in calls.items():
                    key = f"{name}, {case}, {str(dtype).removeprefix('torch.')}"
                    try:
                        errors[key] = exact.check(call, x)
                    except Exception as error:  # one operator that fails must not hide the others
                        wrong.append(f"{key}: {_first_line(error)}")
                del x
    path = "triton" if use_triton(torch.empty(0, device=settings.device)) else "reference, no kernel ran"
    found: Found = {
        "path": path,
        "compared": len(errors),
        "largest_error": max(errors.values(), default=None),
        "errors": errors,
    }
    if wrong:
        raise StepFailed("; ".join(wrong), found)
    return found


@torch.inference_mode()
def relaunch(settings: Settings) -> Found:
    """``prune_tokens`` launched again and again, shapes alternating: counters must reset, bits must stay the same.

    Results of a burst are compared after it, on the device, and the count is read once, at the end.
    """
    inputs = [make_inputs(case, settings.dtype, settings.device) for case in settings.alternating]
    for x in inputs:
        exact.check(operators.prune_tokens, x)
    first = [operators.prune_tokens(x) for x in inputs]
    wrong = torch.zeros((), dtype=torch.int64, device=settings.device)
    order = [i % len(inputs) for i in range(settings.relaunches)]
    burst = 10
    for start in range(0, len(order), burst):
        numbers = order[start : start + burst]
        results = [operators.prune_tokens(inputs[i]) for i in numbers]
        for i, result in zip(numbers, results, strict=True):
            wrong += exact.differing(result, first[i])
    found = {"launches": len(order), "shapes": [str(case) for case in settings.alternating]}
    if int(wrong):
        raise StepFailed(f"{int(wrong)} elements differ from the first launch", found)
    return found


def run_on_streams(settings: Settings) -> Found:
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
    found: Found = {
        "threads": settings.threads,
        "streams": settings.threads if cuda.is_cuda(settings.device) else "none, the CPU has none",
        "calls": settings.threads * settings.repeats * len(calls),
    }
    differ = sorted({name for thread in counts for name, count in thread.items() if count})
    if differ:
        raise StepFailed(f"results differ from one stream's: {'; '.join(differ)}", found)
    return found


@torch.inference_mode()
def replay_graphs(settings: Settings) -> Found:
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
            wrong.append(f"{name}: {_first_line(error)}")
    if wrong:
        raise StepFailed("; ".join(wrong))
    return {"operators": [name for name, *_ in settings.every_call()], "replays_each": settings.repeats}


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


@torch.inference_mode()
def time_the_host(settings: Settings) -> Found:
    """Microseconds until the host has control again, per call of each operator."""
    times = {}
    for name, call, case in settings.every_call():
        x = make_inputs(case, settings.dtype, settings.device)
        bursts = max(settings.repeats // 2, 3)
        values = timing.host([functools.partial(call, x)], settings.device, bursts)
        times[name] = round(timing.quantiles(values).median, 1)
    return {"host_us": times}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
