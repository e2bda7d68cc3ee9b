"""The steps of ``gpu_check`` that start other programs: pytest, compute-sanitizer, the microbenchmarks."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import PATHS, ROOT, goals, record
from bench.small_calls import DONE
from bench.steps import Found, StepFailed

KERNEL_TESTS = ("--noconftest", "tests/support/kernels_checks.py")
# That test's whole content is the kernel checks, which have just run.
GPU_TESTS = ("-m", "gpu", "--deselect", "tests/ops/test_ops_kernels.py::test_results_on_a_gpu", "tests")

LINES = 6
"""Lines of a failing test's message that are reported."""


class NotAvailable(Exception):
    """Raised by what can't be done here. Never the same as passed."""


def run(command: Sequence[str], limit_s: float, **environment: str) -> tuple[int | None, str]:
    """Run a program in the checkout's root.

    Returns:
        Its exit status, None if it ran past the limit and was ended, and what it printed.
    """
    paths = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment}
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(limit_s, 1),
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        return None, output if isinstance(output, str) else output.decode(errors="replace")
    return result.returncode, result.stdout


def run_tests(arguments: Sequence[str], limit_s: float) -> Found:
    """Run pytest, and count; with the names of tests that fail, and what they say.

    In a process of its own: a kernel that corrupts memory, or a test that hangs, ends that and not this one.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += side_by_side()
        code, output = run([*command, *arguments], limit_s, TRITON_INTERPRET="0")
        found: Found = {"passed": 0, "failed": 0, "skipped": 0, "failing": []}
        if report.exists():
            found = read_junit(report)
    found["exit"] = code
    last_lines = "\n".join(output.strip().splitlines()[-LINES:])
    if code is None:
        raise StepFailed(f"ran past {limit_s:.0f} s: {last_lines}", found)
    if found["failing"]:
        raise StepFailed("; ".join(test["name"] for test in found["failing"]), found)
    if code != 0:  # side by side, pytest does not say which file it did not find
        raise StepFailed(f"pytest {' '.join(arguments)}: {last_lines}", found)
    if not found["passed"]:
        raise StepFailed("nothing ran", found)
    return found


def side_by_side() -> list[str]:
    """Options of pytest to use several processors, where pytest-xdist is installed: compiling takes longer than testing."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(os.cpu_count() or 1, 8))]


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


SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}


def sanitize(tool: str, limit_s: float) -> Found:
    """Watch every operator on small shapes with a tool of compute-sanitizer: ``"memcheck"`` or ``"racecheck"``."""
    if shutil.which("compute-sanitizer") is None:
        raise NotAvailable("compute-sanitizer is not on the PATH")
    command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "bench.small_calls"]
    # Memory that PyTorch's allocator keeps for later is memory that memcheck takes for valid.
    code, output = run(command, limit_s, PYTORCH_NO_CUDA_MEMORY_CACHING="1", TRITON_INTERPRET="0")
    if "Device not supported" in output:
        raise NotAvailable("compute-sanitizer does not support this device")
    match = SUMMARIES[tool].search(output)
    problems = None if match is None else int(match[1])
    tail = "\n".join(output.strip().splitlines()[-20:])
    found: Found = {
        "exit": code,
        "problems": problems,
        "calls": output.count(", torch."),
        "output_tail": tail,
    }
    if code is None:
        raise StepFailed(f"{tool} ran past {limit_s:.0f} s, after {found['calls']} calls", found)
    if problems is None:
        raise StepFailed(f"{tool} printed no summary, exit status {code}", found)
    if problems:
        raise StepFailed(f"{tool} reports {problems} problems", found)
    if DONE not in output or code != 0:
        raise StepFailed(
            f"{tool} found nothing, but not every operator was called, exit status {code}", found
        )
    return {name: value for name, value in found.items() if name != "output_tail"}


def run_benchmarks(arguments: Sequence[str], csv: Path, limit_s: float) -> Found:
    """The microbenchmarks, their rows added to ``csv``, and what the kernels should reach held against them."""
    before = len(record.read(csv))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "bench",
        "--csv",
        str(csv.resolve()),
        *arguments,
    ]
    code, output = run(command, limit_s)
    rows = record.read(csv)[before:]
    verdicts: list[dict[str, Any]] = [asdict(verdict) for verdict in goals.judge(rows)]
    found: Found = {"exit": code, "rows": [asdict(row) for row in rows], "goals": verdicts}
    if code is None:
        found["stopped"] = f"after {limit_s:.0f} s; the rows up to then count"
    if code not in (0, None):
        failing = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise StepFailed("; ".join(failing) or output.strip()[-500:], found)
    if not rows:
        raise StepFailed("nothing was timed", found)
    return found
