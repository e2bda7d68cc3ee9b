"""What the GPU check runs: its own steps, pytest, compute-sanitizer, the microbenchmarks; and how each is judged.

Nothing large is imported here: the check's own process loads no torch, so that nothing a GPU does can end it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench import record
from bench.outcome import FAILED, PASSED, SKIPPED, Found, Outcome
from bench.outside import Ended

MARK = "@bench "
"""Begins a line that a step prints for the check to read."""

KERNEL_TESTS = ("--noconftest", "tests/support/kernels_checks.py")
# That test's whole content is the kernel checks, which are a step of their own.
GPU_TESTS = ("-m", "gpu", "--deselect", "tests/ops/test_ops_kernels.py::test_results_on_a_gpu", "tests")
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

LINES = 6
"""Lines of a failing test's message that are reported."""

FINAL_LINE = "every operator was called"
"""What `bench.small_calls` prints last."""


@dataclass(frozen=True)
class Task:
    """What a program is told.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        csv: Where the microbenchmarks add their rows.
        rows_before: Rows that are there already.
        junit: Where pytest leaves its report.
        relaunches: How often ``prune_tokens`` is launched again; None = as settings say.
    """

    device: str
    csv: Path
    rows_before: int
    junit: Path
    relaunches: int | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether there is anything but the PyTorch reference."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Step:
    """A program, and how it is judged.

    Attributes:
        name: What reports call it.
        part: 1 or 2: each fits a run of nine minutes.
        limit_s: Seconds after which it is ended.
        command: What is run, from the task and the seconds that are left for it.
        judge: What became of it: ``Outcome``, from how it ended and the task.
        environment: Variables beside those that there are.
        why_not: Why it can't be done here, or nothing.
    """

    name: str
    part: int
    limit_s: float
    command: Callable[[Task, float], Sequence[str]]
    judge: Callable[[Ended, Task], Outcome]
    environment: Callable[[Task], dict[str, str]] = field(default=lambda task: {})
    why_not: Callable[[Task], str] = field(default=lambda task: "")


# ---------------------------------------------------------------------------------------------------- own steps
def own(name: str, part: int, limit_s: float, interpreted: bool = False) -> Step:
    """A step of `bench.steps`; ``interpreted`` = kernels by name, which a CPU runs in Triton's interpreter."""

    def command(task: Task, limit_s: float) -> list[str]:
        given = [sys.executable, "-m", "bench.steps", name, "--device", task.device, "--limit", f"{limit_s}"]
        return given if task.relaunches is None else [*given, "--relaunches", str(task.relaunches)]

    def environment(task: Task) -> dict[str, str]:
        return {"TRITON_INTERPRET": "1" if interpreted and not task.on_gpu else "0"}

    def why_not(task: Task) -> str:
        return "Triton is not installed" if interpreted and importlib.util.find_spec("triton") is None else ""

    return Step(
        name, part, limit_s, command, lambda ended, task: judge_own(name, ended), environment, why_not
    )


def said(line: str) -> Found | None:
    """What a line that a step has printed says, if it is for the check to read."""
    if not line.startswith(MARK):
        return None
    try:
        entry: Found = json.loads(line[len(MARK) :])
    except json.JSONDecodeError:  # a step that is ended may not finish its line
        return None
    return entry


def judge_own(name: str, ended: Ended) -> Outcome:
    """A step has passed if it says so and then ends well."""
    entries = [entry for line in ended.output.splitlines() if (entry := said(line)) is not None]
    last = next((entry for entry in entries if "status" in entry), None)
    found = [entry["found"] for entry in entries if "found" in entry]
    if last is None:
        message = ended.how if ended.status != 0 else "ended without saying how"
        return Outcome(name, FAILED, message, found=found)
    if last["status"] != FAILED and ended.status != 0:
        return Outcome(name, FAILED, f"{last['status']}, then {ended.how}", found=found)
    return Outcome(name, last["status"], last["message"], found=found)


# ------------------------------------------------------------------------------------------------------- pytest
def tests(name: str, part: int, limit_s: float, arguments: Sequence[str]) -> Step:
    """Tests that need a GPU, run by pytest."""

    def command(task: Task, limit_s: float) -> list[str]:
        return [*pytest(), f"--junitxml={task.junit}", *side_by_side(), *arguments]

    def why_not(task: Task) -> str:
        return "" if task.on_gpu else f"each of these tests needs a CUDA GPU, this is {task.device}"

    def judge(ended: Ended, task: Task) -> Outcome:
        return judge_tests(name, ended, task.junit, arguments)

    return Step(name, part, limit_s, command, judge, lambda task: {"TRITON_INTERPRET": "0"}, why_not)


def pytest() -> list[str]:
    """How pytest is run."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def side_by_side() -> list[str]:
    """Options of pytest to use several processors, where pytest-xdist is installed: compiling takes longer than testing."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(os.cpu_count() or 1, 8))]


def judge_tests(name: str, ended: Ended, junit: Path, arguments: Sequence[str]) -> Outcome:
    """Count what passed, with the names of tests that fail, and what they say."""
    counts: Found = {"passed": 0, "failed": 0, "skipped": 0, "failing": []}
    if junit.exists():
        counts = read_junit(junit)
        junit.unlink()
    if ended.status is None:
        return Outcome(name, FAILED, f"{ended.how}: {ended.tail()}", found=[counts])
    if counts["failing"]:
        names = "; ".join(test["name"] for test in counts["failing"])
        return Outcome(name, FAILED, names, found=[counts])
    if ended.status != 0:  # side by side, pytest does not say which file it did not find
        message = f"pytest {' '.join(arguments)}, {ended.how}: {ended.tail()}"
        return Outcome(name, FAILED, message, found=[counts])
    if not counts["passed"]:
        return Outcome(name, FAILED, "nothing ran", found=[counts])
    return Outcome(name, PASSED, found=[counts])


def read_junit(report: Path) -> Found:
    """Counts, and the names of tests that failed or broke, with the first lines of their messages."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failing = []
    for test in ElementTree.parse(report).iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        problem = next(
            (found for kind in ("failure", "error") if (found := test.find(kind)) is not None), None
        )
        if problem is not None:
            counts["failed"] += 1
            text = problem.get("message") or problem.text or ""
            failing.append({"name": name, "message": "\n".join(text.splitlines()[:LINES])})
        elif test.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return {**counts, "failing": failing}


# ---------------------------------------------------------------------------------------------------- sanitizer
SMALL_CALLS = (sys.executable, "-m", "bench.small_calls")
SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
    "synccheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
}


def small_calls(part: int, limit_s: float) -> Step:
    """Every operator on small shapes, by itself: it fills Triton's cache, as compiling under a sanitizer takes long."""
    name = "small-calls"

    def judge(ended: Ended, task: Task) -> Outcome:
        counts = {"calls": calls(ended)}
        if ended.status == 0 and FINAL_LINE in ended.output:
            return Outcome(name, PASSED, found=[counts])
        return Outcome(name, FAILED, f"{ended.how}, after {counts['calls']} calls", found=[counts])

    return Step(
        name,
        part,
        limit_s,
        lambda task, limit_s: [*SMALL_CALLS, task.device],
        judge,
        lambda task: {"TRITON_INTERPRET": "0"},
    )


def sanitizer(tool: str, part: int, limit_s: float) -> Step:
    """Every operator on small shapes, watched by a tool of compute-sanitizer."""

    def why_not(task: Task) -> str:
        if not task.on_gpu:
            return f"compute-sanitizer needs a CUDA GPU, this is {task.device}"
        return "" if shutil.which("compute-sanitizer") is not None else "compute-sanitizer is not on the PATH"

    return Step(
        tool,
        part,
        limit_s,
        lambda task, limit_s: ["compute-sanitizer", "--tool", tool, *SMALL_CALLS, task.device],
        lambda ended, task: judge_sanitizer(tool, ended),
        # Memory that PyTorch's allocator keeps for later is memory that memcheck takes for valid.
        lambda task: {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"},
        why_not,
    )


def calls(ended: Ended) -> int:
    """How many operators `bench.small_calls` says it has called."""
    return ended.output.count(", torch.")


def judge_sanitizer(tool: str, ended: Ended) -> Outcome:
    """Passed if the tool found nothing, and every operator was called."""
    if "Device not supported" in ended.output:
        return Outcome(tool, SKIPPED, "compute-sanitizer does not support this device")
    match = SUMMARIES[tool].search(ended.output)
    problems = None if match is None else int(match[1])
    found: list[Found] = [{"problems": problems, "calls": calls(ended)}]
    if ended.status is None:
        message = f"{ended.how}, after {calls(ended)} calls"
    elif problems is None:
        message = f"printed no summary, {ended.how}"
    elif problems:
        message = f"reports {problems} problems"
    elif FINAL_LINE not in ended.output or ended.status != 0:
        message = f"found nothing, but not every operator was called, {ended.how}"
    else:
        return Outcome(tool, PASSED, found=found)
    return Outcome(tool, FAILED, message, found=found)


# --------------------------------------------------------------------------------------------------- benchmarks
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
