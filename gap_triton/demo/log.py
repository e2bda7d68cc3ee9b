"""What has been measured so far, a line for each configuration, so that a run that was broken off can go on."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .table import Case, Row

Answers = tuple[Row, Tensor]


class Log:
    """Rows and the IoU of every answer, by model and configuration: what is measured once serves every table.

    Args:
        folder: Where to write a line as soon as a configuration is measured, into ``measured-MODEL.jsonl``; None = nowhere.
            Runs of different models can share a folder.
        models: Model types that will be measured.
        conditions: What all lines must have in common, such as the number of scenes.
        resume: Whether what the folder holds of these models counts; otherwise it is emptied.

    Raises:
        ValueError: The folder holds answers that were measured under other conditions.
    """

    def __init__(
        self,
        folder: Path | None = None,
        models: Sequence[str] = (),
        conditions: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        self._folder = folder
        self._conditions = dict(conditions or {})
        read = {model: self._read(model, resume) for model in models}
        self._known: dict[str, dict[str, Answers]] = defaultdict(dict, read)

    def find(self, model: str, case: Case) -> Answers | None:
        """Return what was measured of a configuration, under the name and the budget of ``case``; None = nothing yet."""
        answers = self._known[model].get(_key(case.config_dict))
        if answers is None:
            return None
        row, ious = answers
        return replace(row, method=case.method, keep=case.keep), ious

    def add(self, row: Row, ious: Tensor) -> None:
        """Remember a row, and the IoU [N] of each answer."""
        self._known[row.model][_key(row.config)] = row, ious
        if self._folder is not None:
            line = {"conditions": self._conditions, "row": row.as_dict(), "ious": ious.tolist()}
            with self._path(row.model).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _path(self, model: str) -> Path:
        assert self._folder is not None
        return self._folder / f"measured-{model}.jsonl"

    def _read(self, model: str, resume: bool) -> dict[str, Answers]:
        known: dict[str, Answers] = {}
        if self._folder is None:
            return known
        path, whole = self._path(model), []
        if resume and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the run was broken off inside this line
                    continue
                if entry["conditions"] != self._conditions:
                    raise ValueError(
                        f"{path} was measured with {entry['conditions']}, and this run has {self._conditions}; use another "
                        "folder, or start anew"
                    )
                row = Row(**entry["row"])
                known[_key(row.config)] = row, torch.tensor(entry["ious"])
                whole.append(line)
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        return known


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)
