"""Steps that call every operator on small shapes: by itself, and under the tools of compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import sys

from bench.outcome import FAILED, PASSED, SKIPPED, Found, Outcome
from bench.outside import Ended
from bench.step import Step, Task

FINAL_LINE = "every operator was called"
"""What `bench.small_calls` prints last."""

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
