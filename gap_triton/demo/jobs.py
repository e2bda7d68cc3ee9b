"""Several measurements one after the other, with one progress bar over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .log import Log
from .measuring import measure
from .scenes import Scenes
from .table import Case, Row


@dataclass(frozen=True)
class Job:
    """What to measure of one model: no pruning, and each of ``cases``."""

    model: Any
    processor: Any
    cases: Sequence[Case]


def run_jobs(
    console: Console, scenes: Scenes, jobs: Sequence[Job], log: Log | None = None
) -> Iterator[tuple[list[Row], list[Tensor]]]:
    """Return the rows and IoUs of each job, as `measure` gives them, as soon as it is done."""
    columns = (TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(scenes) * sum(len(job.cases) + 1 for job in jobs))
        for job in jobs:
            model = job.model.config.model_type
            bar.update(task, description=f"{model}: timing prefills")

            def advance(name: str, done: int, model: str = model) -> None:
                bar.update(task, advance=done, description=f"{model}: {name}")

            yield measure(job.model, job.processor, scenes, job.cases, progress=advance, log=log)
        bar.update(task, description="done")
