"""Times of one call: eager, with the host's part, and as a replay of a CUDA graph, without it. In microseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch.autograd import DeviceType

from bench import cuda

BUDGET_S = 0.25
"""What one measurement may take, more or less; MIN_ROUNDS are made in any case."""

MIN_ROUNDS, MAX_ROUNDS = 5, 200
BURST_US = 2000.0
"""A round on a GPU is a burst of calls about this long, of MAX_BURST calls at most, and one synchronisation."""

MAX_BURST = 20
GRAPH_US = 20000.0
"""A graph holds calls that take about this long together, GRAPH_CALLS at most."""

GRAPH_CALLS = 20

Function = Callable[[], object]


@dataclass(frozen=True)
class Quantiles:
    """Median and the values that 20 and 80 percent of the rounds stay below."""

    median: float
    p20: float
    p80: float


def quantiles(times: Iterable[float]) -> Quantiles:
    """Quantiles of per-call times, at least two of them, by linear interpolation."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Quantiles(median=tenths[4], p20=tenths[1], p80=tenths[7])


@dataclass(frozen=True)
class Plan:
    """How an eager measurement is cut up: ``rounds`` rounds of ``burst`` calls, each ending in one synchronisation."""

    rounds: int
    burst: int


def plan(functions: Sequence[Function], device: torch.device, budget_s: float) -> Plan:
    """Warm up, and choose a plan that fits the budget. A CPU needs no bursts: there is no queue to fill."""
    for function in functions:
        function()
    seconds = min(timed(functions[i % len(functions)], device) for i in range(3))
    burst = min(max(int(BURST_US * 1e-6 / seconds), 1), MAX_BURST) if cuda.is_cuda(device) else 1
    rounds = int(budget_s / (seconds * burst))
    return Plan(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS), burst)


def timed(function: Function, device: torch.device) -> float:
    """Seconds that one call takes, from an idle device to an idle device."""
    cuda.synchronize(device)
    start = time.perf_counter()
    function()
    cuda.synchronize(device)
    return time.perf_counter() - start


def rotation(functions: Sequence[Function], burst: int, device: torch.device) -> Function:
    """A function that calls the next ``burst`` functions, round and round, and waits for the device."""
    endless = cycle(functions)

    def run() -> None:
        for function in islice(endless, burst):
            function()
        cuda.synchronize(device)

    return run


@dataclass(frozen=True)
class Round:
    """What is measured again and again: ``measure`` returns microseconds per call, of ``calls`` calls."""

    measure: Callable[[], float]
    calls: int


def in_turn(
    ways: Mapping[str, Sequence[Function]],
    device: torch.device,
    budget_s: float = BUDGET_S,
    graphs: bool = False,
) -> dict[str, list[float]]:
    """Time several ways, a round of each after one of every other, so that a clock which changes changes it for all.

    Args:
        ways: Functions by name; the calls of a way go through its functions, round and round.
        device: Where.
        budget_s: Seconds for all of them together, more or less.
        graphs: Whether to replay CUDA graphs, rather than to call the functions.

    Returns:
        Time per call of each round, by name.
    """
    make = _graph_round if graphs else _eager_round
    rounds = {name: make(functions, device) for name, functions in ways.items()}
    seconds = sum(each.measure() * each.calls for each in rounds.values()) * 1e-6
    number = min(max(int(budget_s / seconds), MIN_ROUNDS), MAX_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(number):
        for name, each in rounds.items():
            times[name].append(each.measure())
    return times


def eager(functions: Sequence[Function], device: torch.device, budget_s: float = BUDGET_S) -> list[float]:
    """Time per call of each round: host, launches, device and a share of one synchronisation."""
    return in_turn({"": functions}, device, budget_s)[""]


def graph(functions: Sequence[Function], device: torch.device, budget_s: float = BUDGET_S) -> list[float]:
    """Time per call of each replay of a graph that holds the functions one after another, round and round."""
    return in_turn({"": functions}, device, budget_s, graphs=True)[""]


def _eager_round(functions: Sequence[Function], device: torch.device) -> Round:
    burst = plan(functions, device, 0.0).burst
    run = rotation(functions, burst, device)
    return Round(lambda: timed(run, device) * 1e6 / burst, burst)


def _graph_round(functions: Sequence[Function], device: torch.device) -> Round:
    """Between two events on the device, so the host's part and the launch of the graph itself are left out."""
    cuda.require_cuda(device, "a CUDA graph")
    for function in functions:
        function()
    slowest = max(timed(function, device) for function in functions) * 1e6
    calls = list(islice(cycle(functions), min(max(int(GRAPH_US / slowest), 1), GRAPH_CALLS)))

    def all_calls() -> None:
        for function in calls:
            function()

    captured = cuda.capture(all_calls, device)

    def measure() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        captured.replay()
        end.record()
        cuda.synchronize(device)
        return begin.elapsed_time(end) * 1e3 / len(calls)

    return Round(measure, len(calls))


def host(
    functions: Sequence[Function], device: torch.device, bursts: int = 20, burst: int = 25
) -> list[float]:
    """Time per call until the host has control again, without waiting for the device.

    Bursts are short, and start at an idle device, so that the queue never fills and makes the host wait.
    """
    for function in functions:
        function()
    endless = cycle(functions)
    times = []
    for _ in range(bursts):
        cuda.synchronize(device)
        start = time.perf_counter()
        for function in islice(endless, burst):
            function()
        times.append((time.perf_counter() - start) * 1e6 / burst)
    cuda.synchronize(device)
    return times


LAUNCH_CALLS = 3


def launches(function: Function, device: torch.device) -> float | None:
    """Kernels, copies and fills that the device runs for one call, counted by the profiler.

    A whole number unless calls differ, or the profiler lost an event. None if it saw nothing: then it doesn't work here.
    """
    return len(launched(function, device)) / LAUNCH_CALLS or None


def launched(function: Function, device: torch.device) -> list[str]:
    """Names of what the device runs for ``LAUNCH_CALLS`` calls: kernels, copies and fills, as the profiler saw them."""
    cuda.require_cuda(device, "counting launches")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    function()
    for _ in range(2):  # the first profile of a process can miss its first kernels
        cuda.synchronize(device)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(LAUNCH_CALLS):
                function()
            cuda.synchronize(device)
    return device_events(profile.events())


def device_events(events: Iterable[Any]) -> list[str]:
    """Names of those of a profile's events that ran on the device; ranges that only annotate it aren't among them."""
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    return [event.name for event in on_device if not getattr(event, "is_user_annotation", False)]
