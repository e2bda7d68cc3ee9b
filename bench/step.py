"""A step of the GPU check: which program is run, and how it is judged.

Nothing large is imported here or in the files of the steps: the check's own process loads no torch, so that nothing that a
GPU does can end it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.outcome import Outcome
from bench.outside import Ended


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
