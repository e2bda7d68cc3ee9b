"""Steps of `bench.steps`, which say themselves what they find and how they end."""

from __future__ import annotations

import importlib.util
import json
import sys

from bench.outcome import FAILED, Found, Outcome
from bench.outside import Ended
from bench.step import Step, Task

MARK = "@bench "
"""Begins a line that a step prints for the check to read."""


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
