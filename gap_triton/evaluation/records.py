"""Answers on disk: a line of JSON for each, appended as they come, so that a broken run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .boxes import Box
from .ways import Way


@dataclass(frozen=True)
class Record:
    """One answer and how right it is.

    Attributes:
        way: Name of the way that the model was run.
        id: Of the question.
        answer: Its words.
        right: IoU of the box >= 0.5, or words that are right.
        failed: A box was asked for, and none could be read.
        box: The box in pixels of the image, None = none.
        iou: Of the box with the true one, 0 where there is none; None where words were asked for.
        visual_tokens: Of the prompt.
        kept_tokens: Of these, those that a decoder layer has, mean over all layers.
    """

    way: str
    id: str
    answer: str
    right: bool
    failed: bool
    box: Box | None
    iou: float | None
    visual_tokens: int
    kept_tokens: float


class RecordFile:
    """The file of one evaluation.

    Its first line holds the settings that make answers comparable; a line before the first answer of a way holds its
    configuration.

    Args:
        path: The file; made if missing.
        settings: What must be the same for answers of one file.

    Raises:
        ValueError: The file was written with other settings, or is none of these.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._records: dict[str, dict[str, Record]] = {}
        self._configs: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))  # as they will be read again
        if path.exists() and path.stat().st_size:
            self._read(settings)
        else:
            self._append({"settings": settings})

    def of(self, way: Way) -> dict[str, Record]:
        """Return the answers that are there already, by question.

        Raises:
            ValueError: They were given with another configuration of that name.
        """
        config = json.loads(json.dumps(asdict(way.config)))
        known = self._configs.setdefault(way.name, config)
        if known != config:
            raise ValueError(
                f"{str(self.path)!r} has answers of {way.name!r} with the configuration {known}, which is now {config}: "
                "choose another folder, or remove the file"
            )
        return self._records.setdefault(way.name, {})

    def add(self, way: Way, records: Sequence[Record]) -> None:
        """Append answers."""
        known = self.of(way)
        lines: list[dict[str, Any]] = []
        if not known:
            lines.append({"way": way.name, "config": asdict(way.config)})
        lines += [asdict(record) for record in records]
        self._append(*lines)
        known.update({record.id: record for record in records})

    def _append(self, *lines: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _read(self, settings: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            first, *others = (json.loads(line) for line in whole.decode("utf-8").split("\n") if line)
            known = first["settings"]
            for line in others:
                if "config" in line:
                    self._configs[line["way"]] = line["config"]
                else:
                    box = line["box"] and tuple(line["box"])
                    self._records.setdefault(line["way"], {})[line["id"]] = Record(**{**line, "box": box})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(self.path)!r} is no file of answers: {error!r}; choose another folder"
            ) from error
        for name in {**known, **settings}:
            if known.get(name) != settings.get(name):
                raise ValueError(
                    f"{str(self.path)!r} has answers with {name} {known.get(name)!r}, and now it is "
                    f"{settings.get(name)!r}: choose another folder, or remove the file"
                )
        if len(whole) < len(content):  # the run ended in the middle of a line
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
