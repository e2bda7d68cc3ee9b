"""One measurement: check that a way to compute a result is right, then time it in every mode there is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gap_kernels
import pytest
import torch
from gap_kernels.backends import use_triton

from bench import cuda, record, rivals, table, timing
from bench.floor import Rates, Work, measure_rates
from bench.operators import Call, Result
from bench.shapes import Case, Inputs, make_inputs

Agree = Callable[[Inputs, Result, Result, torch.dtype], None]
CountWork = Callable[[Case, torch.dtype], Work]

MAX_SETS = 16
"""Sets of inputs that calls go through in turn, at most, so that they don't find their inputs in the L2 cache."""

MATRICES = 3
"""S x S matrices that eager attention holds at once: logits, weights, and a copy on the way."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a result.

    Attributes:
        name: What the tables call it.
        call: Computes it. None: not installed.
        backend: Path of the operators inside ``call``.
        compile: Whether to run it under ``torch.compile``.
        matrix: Whether it builds the S x S matrix, in the dtype of the model.
        rounds: Whether it rounds its result, as far as the dtype of the model would.
        max_head_dim: Wider heads are skipped, as it computes wrong results for them.
        max_tokens: Longer prompts are skipped, because ``why_shorter``.
        why_shorter: The reason.
    """

    name: str
    call: Call | None
    backend: str = "auto"
    compile: bool = False
    matrix: bool = False
    rounds: bool = False
    max_head_dim: int | None = None
    max_tokens: int | None = None
    why_shorter: str = ""

    def __str__(self) -> str:
        return self.name


def ours(call: Call, suffix: str = "") -> list[Contender]:
    """The operator on its kernels and on its definition."""
    return [
        Contender(f"triton{suffix}", call, backend="triton"),
        Contender(f"reference{suffix}", call, backend="reference"),
    ]


def compiled(call: Call, max_tokens: int | None = None) -> Contender:
    """The definition under ``torch.compile``."""
    why = "its loop over blocks of 512 rows is unrolled, and compiling that takes minutes"
    return Contender("compiled", call, compile=True, max_tokens=max_tokens, why_shorter=why)


@dataclass(frozen=True)
class Subject:
    """The result that contenders of one test compute.

    Attributes:
        name: Name of the operator in the tables.
        call: The operator; its definition is what each contender must agree with.
        agree: Fails unless a contender's result is that of the definition.
        work: Counts what a call can't avoid.
    """

    name: str
    call: Call
    agree: Agree
    work: CountWork


@dataclass
class Bench:
    """What the measurements of a run share."""

    device: torch.device
    budget_s: float
    csv: Path
    machine: record.Machine
    rows: list[record.Row] = field(default_factory=list)
    skips: list[table.Skip] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """What models run in: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if cuda.is_cuda(self.device) else torch.float32

    @functools.cached_property
    def rates(self) -> Rates:
        """Measured once per run."""
        return measure_rates(self.device, self.dtype)

    @functools.cached_property
    def has_kernels(self) -> bool:
        """Whether the operators take their kernels on this device unasked."""
        return use_triton(torch.empty(0, device=self.device))

    def measure(self, benchmark: Any, subject: Subject, case: Case, contender: Contender) -> None:
        """Check and time one contender on one case; skip it with a reason that the table repeats."""
        reason = self.why_not(case, contender)
        if reason:
            self.skip(subject, case, contender, reason)
        torch.manual_seed(0)
        try:
            self._measure(benchmark, subject, case, contender)
        except torch.OutOfMemoryError:
            cuda.release(self.device)
            self.skip(subject, case, contender, "out of memory")

    def why_not(self, case: Case, contender: Contender) -> str:
        """Why a contender can't be timed here, or nothing."""
        if contender.call is None:
            return "not installed"
        if contender.backend == "triton" and not self.has_kernels:
            return "kernels need a CUDA GPU and Triton"
        if contender.max_tokens is not None and case.shape.tokens > contender.max_tokens:
            return contender.why_shorter
        if contender.max_head_dim is not None and case.shape.head_dim > contender.max_head_dim:
            return f"it reads the first {contender.max_head_dim} columns of a head only"
        matrices = MATRICES * case.shape.matrix_bytes(case.batch, self.dtype)
        if contender.matrix and matrices > cuda.memory_bytes(self.device):
            return "the S x S matrix does not fit in memory"
        return ""

    def skip(self, subject: Subject, case: Case, contender: Contender, reason: str) -> None:
        """Note why, and leave the test."""
        self.skips.append(table.Skip(subject.name, str(case), contender.name, reason))
        pytest.skip(reason)

    def _measure(self, benchmark: Any, subject: Subject, case: Case, contender: Contender) -> None:
        work = subject.work(case, self.dtype)
        sets = input_sets(case, self.dtype, self.device, self.number_of_sets(case, work))
        assert contender.call is not None
        call = rivals.compiled(contender.call) if contender.compile else contender.call
        with torch.inference_mode(), backend(contender.backend):
            result = call(sets[0])
            with backend("reference"):
                expected = subject.call(sets[0])
            rounded = contender.matrix or contender.rounds
            subject.agree(sets[0], expected, result, self.dtype if rounded else torch.float32)
            del expected, result
            functions = [functools.partial(call, x) for x in sets]
            launches = timing.launches(functions[0], self.device) if cuda.is_cuda(self.device) else None
            chosen = timing.plan(functions, self.device, self.budget_s)
            run = timing.rotation(functions, chosen.burst, self.device)
            benchmark.pedantic(run, rounds=chosen.rounds, warmup_rounds=1)
            times = {"eager": [seconds * 1e6 / chosen.burst for seconds in benchmark.stats.stats.data]}
            if cuda.is_cuda(self.device):
                times["graph"] = timing.graph(functions, self.device, self.budget_s)
        benchmark.extra_info["calls_per_round"] = chosen.burst
        for mode, values in times.items():
            quantiles, floor = timing.quantiles(values), self.rates.floor_us(work, mode)
            row = record.Row(
                operator=subject.name,
                shape=case.shape.name,
                batch=case.batch,
                dtype=str(self.dtype).removeprefix("torch."),
                implementation=contender.name,
                mode=mode,
                median_us=quantiles.median,
                p20_us=quantiles.p20,
                p80_us=quantiles.p80,
                bytes=work.bytes,
                flops=work.flops,
                launches=launches,
                floor_us=floor,
                ratio=quantiles.median / floor,
            )
            benchmark.extra_info[mode] = {"median_us": quantiles.median, "ratio": row.ratio}
            self.rows.append(row)
            record.append(self.csv, self.machine, row)

    def number_of_sets(self, case: Case, work: Work) -> int:
        """Enough sets to move twice the L2 cache before one comes round again, as far as memory allows."""
        wanted = -(-2 * cuda.cache_bytes(self.device) // work.bytes)
        shape = case.shape
        row = (shape.query_heads + 2 * shape.key_heads + 2) * shape.head_dim + shape.channels
        size = case.batch * shape.tokens * row * self.dtype.itemsize
        return max(min(wanted, MAX_SETS, cuda.memory_bytes(self.device) // (8 * size)), 1)


def backend(name: str) -> AbstractContextManager[None]:
    """The operators' path; ``"auto"`` leaves it as it is."""
    return nullcontext() if name == "auto" else gap_kernels.backend(name)


@functools.lru_cache(maxsize=1)
def input_sets(case: Case, dtype: torch.dtype, device: torch.device, count: int) -> list[Inputs]:
    """Inputs for the contenders of one case, which come one after another; the last case's are dropped."""
    return [make_inputs(case, dtype, device, seed) for seed in range(count)]
