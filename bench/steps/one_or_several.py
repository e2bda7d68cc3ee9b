"""Pruning in one launch against several, and against the unfused reference: which is faster where.

The ways take turns, each by replays of its own graph. Their rows say what the goals ask, before the benchmarks do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict

import gap_kernels
import torch
from torch import Tensor

from bench import agree, cuda, floor, operators, timing
from bench.floor import Rates
from bench.operators import Call, Result
from bench.outcome import Found
from bench.prune_ways import in_one_launch, in_several_launches, require_kernels, where_kernels_ran
from bench.record import Row
from bench.shapes import Case, Inputs, make_inputs
from bench.steps.settings import Settings
from bench.words import short

SETS = 6
"""Sets of inputs at batch 1, so that calls don't find theirs in the L2 cache."""


def reference(call: Call) -> Call:
    """A call on the definition in PyTorch."""

    def run(x: Inputs) -> Result:
        with gap_kernels.backend("reference"):
            return call(x)

    return run


def ways_of(call: Call, rows: Callable[[Inputs], Tensor | None], on_gpu: bool) -> dict[str, Call]:
    """By name: what the package chooses on a GPU, both ways by force, and the reference."""
    return {
        **({"triton": call} if on_gpu else {}),
        "one launch": lambda x: in_one_launch(x, rows(x)),
        "one launch, cooperative": lambda x: in_one_launch(x, rows(x), ticket=False),
        "several launches": lambda x: in_several_launches(x, rows(x)),
        "reference": reference(call),
    }


OPERATORS: dict[str, tuple[Call, Callable[[Inputs], Tensor | None]]] = {
    "prune_tokens": (operators.prune_tokens, lambda x: None),
    "prune_tokens, text rows": (operators.prune_tokens_text, lambda x: x.text_rows),
}
"""Each with the rows that score."""


@torch.inference_mode()
def compare(settings: Settings) -> Iterator[Found]:
    """Time all ways for the last row and for all text rows, at every prompt; a CPU is spared the second."""
    require_kernels(settings.device)
    on_gpu = cuda.is_cuda(settings.device)
    rates = floor.measure_rates(settings.device, settings.dtype)
    for case in settings.compared:
        count = SETS if on_gpu and case.batch == 1 else 1
        sets = [make_inputs(case, settings.dtype, settings.device, seed) for seed in range(count)]
        for name in OPERATORS if on_gpu else list(OPERATORS)[:1]:
            for made in _rows(name, case, sets, settings, rates):
                found: Found = {"row": asdict(made)}
                yield found if on_gpu else {**found, "path": path_on_a_cpu(made.implementation)}
        del sets


def _rows(name: str, case: Case, sets: list[Inputs], settings: Settings, rates: Rates) -> Iterator[Row]:
    """Check that all ways of an operator agree at one prompt, and time them."""
    on_gpu = cuda.is_cuda(settings.device)
    call, rows = OPERATORS[name]
    scoring = rows(sets[0])
    work = floor.prune_work(case, settings.dtype, rows=1 if scoring is None else scoring.shape[1])
    ways = ways_of(call, rows, on_gpu)
    expected = ways["reference"](sets[0])
    for run in ways.values():
        agree.same_pruning(sets[0], expected, run(sets[0]), torch.float32)
    functions = {way: [functools.partial(run, x) for x in sets] for way, run in ways.items()}
    launches = {
        way: timing.launches(calls[0], settings.device) if on_gpu else None
        for way, calls in functions.items()
    }
    for mode in ("graph", "eager") if on_gpu else ("eager",):
        budget_s = settings.budget_s * len(ways)
        times = timing.in_turn(functions, settings.device, budget_s, graphs=mode == "graph")
        for way, values in times.items():
            quantiles, least = timing.quantiles(values), rates.floor_us(work, mode)
            yield Row(
                operator=name,
                shape=case.shape.name,
                batch=case.batch,
                dtype=short(settings.dtype),
                implementation=way,
                mode=mode,
                median_us=quantiles.median,
                p20_us=quantiles.p20,
                p80_us=quantiles.p80,
                bytes=work.bytes,
                flops=work.flops,
                launches=launches[way],
                floor_us=least,
                ratio=quantiles.median / least,
            )


def path_on_a_cpu(way: str) -> str:
    """What a report says beside a time that says nothing about a GPU."""
    return "reference, no kernel ran" if way == "reference" else where_kernels_ran(torch.device("cpu"))
