"""The whole evaluation: every way over every question, what it costs, and the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import gap_triton

from ..demo.grounding import box_iou
from ..demo.report import can_draw
from ..demo.table import IOU_THRESHOLD
from ..environment import device_name, installed_versions
from .asking import Answer, Asker
from .costs import QUESTIONS, ROUNDS, measure_costs
from .question import Question
from .records import Record, RecordFile
from .reported import Reported
from .summary import Comparison, Row, compare, in_words, markdown_of, notes_of, row_of, table_of
from .vqa import is_right
from .ways import Way

ANSWERS, RESULTS, TABLE, CASES = "answers.jsonl", "results.json", "results.md", "cases.png"


@dataclass(frozen=True)
class Evaluation:
    """What to ask of which model, and where the files go.

    Attributes:
        asker: The model.
        questions: What to ask, all of one data set and split.
        ways: Ways to run the model, unpruned first.
        settings: What must be the same for answers of one file, for the reader of the results as well.
        output: Folder for the files; made if missing.
        reported: Figures of papers to show beside.
        batch_size: Questions per call of ``generate``.
    """

    asker: Asker
    questions: Sequence[Question]
    ways: Sequence[Way]
    settings: dict[str, Any]
    output: Path
    reported: Sequence[Reported] = ()
    batch_size: int = 8

    def run(self, console: Console) -> tuple[list[Row], list[Comparison]]:
        """Ask what is not answered yet, measure costs, print the table and write all files.

        Raises:
            ValueError: A way can't be run on the model, the folder holds answers of another evaluation, an image can't be
                read, or the memory is too small for a batch.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        for way in self.ways:  # what is refused is refused before anything is asked
            try:
                gap_triton.configure(self.asker.model, way.config)
            except ValueError as error:
                raise ValueError(f"{way.name}: {error}") from error
        file = RecordFile(self.output / ANSWERS, self.settings)
        for way in self.ways:
            file.of(way)
        records, costs = [], []
        with _progress(console) as bar:
            for way in self.ways:
                records.append(list(self._answer(way, file, bar)))
            calls = min(QUESTIONS, len(self.questions)) * (ROUNDS + 1) * len(self.ways)
            task = bar.add_task("first token and KV cache", total=calls, accuracy="")
            costs = measure_costs(self.asker, self.questions, self.ways, lambda done: bar.advance(task, done))
        rows = [
            row_of(way, of_way, cost, self.reported)
            for way, of_way, cost in zip(self.ways, records, costs, strict=True)
        ]
        comparisons = compare(self.ways, records)
        self._print(console, rows, comparisons)
        self._write(console, rows, comparisons, records)
        return rows, comparisons

    def _answer(self, way: Way, file: RecordFile, bar: Progress) -> Iterator[Record]:
        """The answers of a way to all questions, in their order, those on disk first."""
        known = file.of(way)
        missing = [question for question in self.questions if question.id not in known]
        task = bar.add_task(
            way.name, total=len(self.questions), completed=len(self.questions) - len(missing), accuracy=""
        )
        gap_triton.configure(self.asker.model, way.config)
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            try:
                answers = self.asker.ask(batch, way.config)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"batch_size={self.batch_size}: {way.name} does not fit into the memory ({error}); what was answered is "
                    "saved, go on with a smaller one"
                ) from error
            file.add(way, [self._judge(way, *pair) for pair in zip(batch, answers, strict=True)])
            bar.update(task, advance=len(batch), accuracy=_accuracy(known.values()))
        bar.update(task, accuracy=_accuracy(known.values()))
        return (known[question.id] for question in self.questions)

    def _judge(self, way: Way, question: Question, answer: Answer) -> Record:
        box, iou = None, None
        if question.box is None:
            right = is_right(answer.text, question.answers)
        else:
            box = self.asker.format.read(answer.text, answer.view)
            iou = 0.0
            if box is not None:
                first, second = (torch.tensor(each, dtype=torch.float64) for each in (box, question.box))
                iou = float(box_iou(first, second))
            right = iou >= IOU_THRESHOLD
        return Record(
            way=way.name,
            id=question.id,
            answer=answer.text,
            right=right,
            failed=question.box is not None and box is None,
            box=box,
            iou=iou,
            visual_tokens=answer.visual_tokens,
            kept_tokens=answer.kept_tokens,
        )

    def _print(self, console: Console, rows: Sequence[Row], comparisons: Sequence[Comparison]) -> None:
        console.print(
            table_of(
                rows, f"{self.settings['data']} {self.settings['split']}, {len(self.questions)} questions"
            )
        )
        for each in comparisons:
            console.print(f"{each.way} - {each.against}: {in_words(each)}", highlight=False, soft_wrap=True)
        for row in rows:
            if row.reported is not None:
                console.print(
                    f"{row.way}: {row.reported:.2f}% in {row.source}", highlight=False, soft_wrap=True
                )
        for note in notes_of(rows, self.reported):
            console.print(note, style="dim", highlight=False, soft_wrap=True)

    def _write(
        self,
        console: Console,
        rows: Sequence[Row],
        comparisons: Sequence[Comparison],
        records: Sequence[Sequence[Record]],
    ) -> None:
        results = {
            "settings": self.settings,
            "questions": len(self.questions),
            "rows": [row.as_dict() for row in rows],
            "comparisons": [each.as_dict() for each in comparisons],
            "reported": [each.as_dict() for each in self.reported],
            "iou_threshold": IOU_THRESHOLD,
            "versions": installed_versions(),
            "device": device_name(self.asker.model.device),
        }
        (self.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (self.output / TABLE).write_text(markdown_of(rows, comparisons, self.reported), encoding="utf-8")
        files = [ANSWERS, RESULTS, TABLE]
        if len(self.ways) > 1 and self.questions[0].box is not None and can_draw(console, CASES):
            from .cases import lines_of, save_cases

            title = f"{self.settings['data']} {self.settings['split']}: {self.ways[1].name}"
            save_cases(lines_of(self.questions, self.ways, records), title, self.output / CASES)
            files.append(CASES)
        for name in files:
            console.print(f"wrote {self.output / name}", highlight=False, soft_wrap=True)


def _accuracy(records: Any) -> str:
    records = list(records)
    return f"{sum(record.right for record in records) / len(records):.3f} right" if records else ""


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
