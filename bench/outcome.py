"""What becomes of a step of the GPU check, and the file that says so line by line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Found = dict[str, Any]

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class StepFailed(Exception):
    """What is wrong, in words."""


class NotAvailable(Exception):
    """Raised by what can't be done here. Never the same as passed."""


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        step: Its name.
        status: ``"passed"``, ``"failed"``, or ``"skipped"`` where it can't be done.
        message: Why it failed or was skipped.
        seconds: How long it took.
        found: What it measured or counted, in the order in which it came.
        output: The end of what it printed, if it failed.
    """

    step: str
    status: str
    message: str = ""
    seconds: float = 0.0
    found: list[Found] = field(default_factory=list)
    output: str = ""


class Journal:
    """A file of JSON lines, each of which is there as soon as it is written. A file that exists is added to."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, **entry: object) -> None:
        """Add a line."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def ended(self, outcome: Outcome) -> None:
        """Add the lines of a step that has ended; what it found is there already."""
        output = {"output": outcome.output} if outcome.output else {}
        self.write(
            step=outcome.step,
            status=outcome.status,
            message=outcome.message,
            seconds=round(outcome.seconds, 1),
            **output,
        )


def read(paths: Iterable[Path]) -> tuple[list[Found], list[Outcome]]:
    """The runs and the outcomes in files of JSON lines; of a step that ran more than once, the last time counts.

    A step that began and did not end has failed: the check was stopped in it.
    """
    runs: list[Found] = []
    outcomes: dict[str, Outcome] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "run" in entry:
                runs.append(entry["run"])
            elif "begins" in entry:
                outcomes.pop(entry["begins"], None)
                outcomes[entry["begins"]] = Outcome(
                    entry["begins"], FAILED, "the check was stopped while it ran"
                )
            elif "found" in entry:
                outcomes[entry["step"]].found.append(entry["found"])
            elif "step" in entry:
                outcome = outcomes.setdefault(entry["step"], Outcome(entry["step"], FAILED))
                outcome.status, outcome.message = entry["status"], entry["message"]
                outcome.seconds, outcome.output = entry["seconds"], entry.get("output", "")
    return runs, list(outcomes.values())
