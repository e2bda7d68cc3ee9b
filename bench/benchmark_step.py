"""The step that runs a part of the microbenchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from bench import record
from bench.gpu_tests import pytest
from bench.outcome import FAILED, PASSED, Found, Outcome
from bench.outside import Ended
from bench.step import Step, Task

# What goals ask for comes first. Compiling takes longest, so one prompt has that.
FILES = tuple(
    f"bench/test_{name}.py"
    for name in ("prune", "select", "attention", "importance", "received", "region", "aggregate")
)
BENCHMARKS = (
    *FILES,
    *("-k", "not compiled or (prune and llava-1.5)"),
    *("--shapes", "llava-1.5,llava-next,qwen2.5-vl-4k,clip-336", "--batches", "1", "--budget", "0.1"),
)
TINY_BENCHMARKS = (*FILES, "-k", "not compiled", "--shapes", "tiny,tiny-tower", "--budget", "0.01")


def benchmarks(part: int, limit_s: float, arguments: Sequence[str] = BENCHMARKS) -> Step:
    """A part of the microbenchmarks; a CPU gets tiny shapes. Rows that were measured before the limit count."""
    name = "benchmarks"

    def command(task: Task, limit_s: float) -> list[str]:
        chosen = arguments if task.on_gpu else TINY_BENCHMARKS
        return [*pytest(), "--device", task.device, "--csv", str(task.csv.resolve()), *chosen]

    return Step(name, part, limit_s, command, lambda ended, task: judge_benchmarks(name, ended, task))


def judge_benchmarks(name: str, ended: Ended, task: Task) -> Outcome:
    """Passed if everything ran, nothing failed and something was timed; rows that were measured count in any case."""
    rows: list[Found] = [{"row": asdict(row)} for row in record.read(task.csv)[task.rows_before :]]
    failing = [line for line in ended.output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if ended.status is None:
        return Outcome(name, FAILED, f"{ended.how}; the {len(rows)} rows up to then count", found=rows)
    if failing or ended.status != 0:
        return Outcome(name, FAILED, "; ".join(failing) or f"{ended.how}: {ended.tail()}", found=rows)
    if not rows:
        return Outcome(name, FAILED, "nothing was timed")
    return Outcome(name, PASSED, found=rows)
