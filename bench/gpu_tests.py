"""Steps that are tests, run by pytest."""

from __future__ import annotations

import importlib.util
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from bench.outcome import FAILED, PASSED, Found, Outcome
from bench.outside import Ended
from bench.step import Step, Task

KERNEL_TESTS = ("--noconftest", "tests/support/kernels_checks.py")
# That test's whole content is the kernel checks, which are a step of their own.
GPU_TESTS = ("-m", "gpu", "--deselect", "tests/ops/test_ops_kernels.py::test_results_on_a_gpu", "tests")

LINES = 6
"""Lines of a failing test's message that are reported."""


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
