"""A user's own model on a data set, for ``gap-triton eval --dataset``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gap_triton.evaluation.asking import Asker
from gap_triton.evaluation.boxes import FORMATS, BoxFormat, find_format
from gap_triton.evaluation.question import Question
from gap_triton.evaluation.refcoco import read_refcoco
from gap_triton.evaluation.reported import reported_for
from gap_triton.evaluation.run import Evaluation
from gap_triton.evaluation.synthetic import write_refcoco
from gap_triton.evaluation.vqa import PROMPT, read_vqa
from gap_triton.evaluation.ways import Way

from .choices import SYNTHETIC, VQA
from .loading import Source

SCENES = 512  # of the synthetic set, where no limit is given


@dataclass(frozen=True)
class DatasetRun:
    """What to evaluate, as the options say it."""

    dataset: str
    split: str
    data: Path | None
    limit: int | None
    source: Source
    ways_for: Callable[[Any], list[Way]]
    format: str | None
    question: str | None
    batch_size: int
    max_new_tokens: int
    output: Path


def evaluate_dataset(run: DatasetRun, console: Console) -> None:
    """Read the questions, load the model, and evaluate it.

    Raises:
        ValueError: Data are missing, or the model can't be loaded or pruned so.
        ImportError: A package is missing.
    """
    questions = read(run)
    source = run.source
    config, processor = source.load_processor()
    box_format = format_of(run, config.model_type)
    with console.status("loading the model"):
        model = source.load_model("gap_triton")
    settings = {
        "data": run.dataset,
        "split": run.split,
        "folder": None if run.data is None else str(run.data.absolute()),
        "model": source.name,
        "revision": source.revision,
        "format": box_format.name,
        "question": box_format.question if questions[0].box is not None else PROMPT,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": run.max_new_tokens,
    }
    asker = Asker(model, processor, box_format, embedded=source.embedded, max_new_tokens=run.max_new_tokens)
    Evaluation(
        asker,
        questions,
        run.ways_for(model),
        settings,
        run.output,
        [] if source.embedded is not None else reported_for(run.dataset, run.split, config.model_type),
        run.batch_size,
    ).run(console)


def read(run: DatasetRun) -> list[Question]:
    """Return the questions, the first ``limit`` of them.

    Raises:
        ValueError: There are none; the message says what to download.
    """
    if run.dataset == SYNTHETIC:
        # Scenes are a prefix of more of them, so answers stay valid when the limit is raised.
        file = write_refcoco(run.output / SYNTHETIC, run.limit or SCENES, run.split)
        return read_refcoco("refcoco", run.split, file)
    data = Path("data", run.dataset) if run.data is None else run.data
    questions = read_vqa(data) if run.dataset == VQA else read_refcoco(run.dataset, run.split, data)
    if not questions:
        raise ValueError(f"no questions in {str(data)!r}")
    return questions[: run.limit]


def format_of(run: DatasetRun, model_type: str) -> BoxFormat:
    """Return how the model is asked for a box.

    Raises:
        ValueError: Nothing is known of such a model, or the question has no place for the expression.
    """
    name = run.format or ("embedded" if run.source.embedded is not None else None)
    if run.dataset == VQA:  # no box is asked for, but the image is prepared as for one
        try:
            return find_format(name, model_type)
        except ValueError:
            if run.format is not None:
                raise
            return FORMATS["shares"]
    found = find_format(name, model_type)
    if run.question is None:
        return found
    if "{}" not in run.question:
        raise ValueError(f"question {run.question!r}: expected a place for the expression, {{}}")
    return replace(found, question=run.question)
