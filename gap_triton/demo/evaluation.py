"""``gap-triton eval``: the tables of the docs, measured on the embedded models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

import gap_triton

from .. import GapConfig
from ..config import BEFORE_THE_DECODER, DECODER_SCORES, VISION_COVERAGES, VISION_SCORES
from ..environment import default_device, device_name, installed_versions
from ..strategies.by_features import WEIGHTED
from .compare import compare
from .coverage import coverage_cases, coverage_markdown, plain_of
from .jobs import Job, run_jobs
from .log import Log
from .methods import PLAIN, method_cases, methods_markdown, methods_table, score_without_cls
from .report import can_draw, markdown_of, table_of, write_results
from .run import load_embedded_model
from .scenes import Split, held_out
from .table import Case, Row

WITHOUT_SCORES = ("max_min",)
Budgets = Sequence[float | int]
Measured = list[tuple[list[Row], list[Tensor]]]  # by model


def sweep_configs(
    layers: Sequence[int],
    scores: Sequence[str],
    budgets: Budgets,
    ids: Sequence[str],
    coverages: Sequence[str] = ("topk",),
    exponents: Sequence[float] = (1.0,),
) -> list[GapConfig]:
    """Return one-stage configurations of every combination that there is.

    After the vision encoder (layer -1) no attention of the decoder ranks: there its scores become ``"random"``. Scores that
    only exist there are left out of decoder layers, and so are coverages. A coverage that no score plays a part in is there
    once, with the first, and one that takes no score to a power once for all exponents.

    Raises:
        ValueError: A value is not one of `GapConfig`, a score or a coverage is used at none of the layers, or nothing is
            left to measure but no pruning, which always is.
    """
    configs: list[GapConfig] = []
    covered = set()
    ways = [
        (coverage, exponent)
        for coverage, exponent in product(coverages, exponents)
        if coverage in WEIGHTED or exponent == exponents[0]
    ]
    for layer, score, (coverage, power), keep, rule in product(layers, scores, ways, budgets, ids):
        exponent = power if coverage in WEIGHTED else 1.0
        if layer >= 0 and score in VISION_SCORES and score not in DECODER_SCORES:
            continue
        covered.add(score)
        if layer >= 0 and coverage in VISION_COVERAGES:
            continue
        if coverage in WITHOUT_SCORES and any(
            (each.layer, each.coverage, each.keep, each.ids) == (layer, coverage, keep, rule)
            for each in configs
        ):
            continue
        ranked_by: Any = score
        if layer == BEFORE_THE_DECODER and score in DECODER_SCORES and score not in VISION_SCORES:
            ranked_by = "random"
        config = GapConfig(keep, layer, ranked_by, coverage, ids=rule, exponent=exponent)  # type: ignore[arg-type]
        if config not in configs and not config.changes_nothing:
            configs.append(config)
    if covered and not configs:
        raise ValueError(
            "ids 'kept' and budget 1.0 are no pruning, which is always the first row: add other ids or budgets"
        )
    for score in scores:
        if score not in covered:
            raise ValueError(f"score {score!r} exists after the vision encoder only: add layer -1")
    for coverage in coverages:
        if coverage in VISION_COVERAGES and BEFORE_THE_DECODER not in layers:
            raise ValueError(f"coverage {coverage!r} exists after the vision encoder only: add layer -1")
    return configs


class Evaluation:
    """What to measure of which models, collected first, so that one progress bar shows all of it.

    Without matplotlib there are no pictures, but a message.

    Args:
        console: Where to print.
        output: Folder for the files; made where it is missing.
        samples: Held-out scenes to ask about.
        models: Names of embedded models.
        split: Of the held-out scenes, one of `SPLITS`.
    """

    def __init__(
        self,
        console: Console,
        output: Path,
        samples: int,
        models: Sequence[str],
        split: Split = "report",
    ) -> None:
        self.console, self.output, self.samples, self.split = console, output, samples, split
        self.device = default_device()
        self.models = [load_embedded_model(self.device, name) for name in models]
        self._jobs: list[Job] = []
        self._writers: list[Callable[[Measured], None]] = []

    def add_methods(self, names: Sequence[str], budgets: Budgets) -> None:
        """Add presets at budgets, ids kept and compacted: ``methods.json``, ``methods.md``, ``methods.png``.

        Raises:
            ValueError: No preset takes any of the budgets.
        """
        plans = [method_cases(model, names, budgets) for model, _ in self.models]
        refused = [each for _, refusals in plans for each in refusals]
        for cases, refusals in plans:
            if not cases:
                raise ValueError(f"nothing to measure: {refusals[0].reason}")

        def write(measured: Measured) -> None:
            rows = [row for pair, _ in measured for row in pair]
            comparisons = [each for pair in measured for each in compare(*pair, lambda row: PLAIN)]
            for pair, _ in measured:
                self.console.print(methods_table(pair, comparisons, self._title(pair[0].model)))
            for refusal in refused:
                self.console.print(f"no row: {refusal.model}, {refusal.method}: {refusal.reason}")
            self._write("methods.json", rows=rows, comparisons=comparisons, refused=refused)
            self._write_text("methods.md", methods_markdown(rows, comparisons, refused))
            if can_draw(self.console, "methods.png"):
                from .charts import save_methods

                save_methods(
                    rows, self._title("Methods with ids compacted and kept"), self.output / "methods.png"
                )
                self._wrote("methods.png")

        self._add([cases for cases, _ in plans], write)

    def add_coverage(self, budgets: Budgets) -> None:
        """Add coverage x ids x budgets at two places: ``coverage.json``, ``coverage.md``, ``coverage.png``."""

        def write(measured: Measured) -> None:
            rows = [row for pair, _ in measured for row in pair]
            comparisons = [
                each for pair in measured for each in compare(*pair, lambda row: plain_of(row, rows).method)
            ]
            self._write("coverage.json", rows=rows, comparisons=comparisons)
            self._write_text("coverage.md", coverage_markdown(rows, comparisons))
            if can_draw(self.console, "coverage.png"):
                from .charts import save_coverage

                save_coverage(rows, self._title("Coverage and position ids"), self.output / "coverage.png")
                self._wrote("coverage.png")

        self._add([coverage_cases(model, budgets) for model, _ in self.models], write)

    def add_sweep(self, configs: Sequence[GapConfig]) -> None:
        """Add configurations of one stage: ``eval.json``, ``eval.md``.

        ``"cls"`` is ``"received"`` where the vision encoder has no CLS token, as for presets.

        Raises:
            ValueError: A model can't be pruned so.
        """
        cases = []
        for model, _ in self.models:
            model_configs = list(configs)
            if score_without_cls(model):
                model_configs = [
                    replace(each, score="received") if each.score == "cls" else each for each in model_configs
                ]
            for config in model_configs:
                gap_triton.configure(model, config)
            cases.append([Case.of(config) for config in dict.fromkeys(model_configs)])

        def write(measured: Measured) -> None:
            rows = [row for pair, _ in measured for row in pair]
            for pair, _ in measured:
                self.console.print(table_of(pair, self._title(pair[0].model)))
            self._write("eval.json", rows=rows)
            self._write_text("eval.md", markdown_of(rows))

        self._add(cases, write)

    def open_log(self, resume: bool = False) -> Log:
        """Return where measurements are noted, with those that a run that was broken off has left there if ``resume``.

        Raises:
            ValueError: These were made of other scenes, on another device, or with other versions.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        conditions = {
            "samples": self.samples,
            "split": self.split,
            "device": device_name(self.device),
            "versions": installed_versions(),
        }
        return Log(self.output, [model.config.model_type for model, _ in self.models], conditions, resume)

    def run(self, log: Log) -> None:
        """Measure everything that was added; print and write each table as soon as it is measured."""
        measured = run_jobs(self.console, held_out(self.samples, self.split), self._jobs, log)
        for write in self._writers:
            write([next(measured) for _ in self.models])

    def _add(self, cases: Sequence[Sequence[Case]], write: Callable[[Measured], None]) -> None:
        self._jobs += [
            Job(*model, model_cases) for model, model_cases in zip(self.models, cases, strict=True)
        ]
        self._writers.append(write)

    def _title(self, subject: str) -> str:
        return f"{subject}, {self.samples} held-out scenes"

    def _write(self, name: str, **parts: Sequence[Any]) -> None:
        write_results(self.output / name, self.samples, self.split, self.device, **parts)
        self._wrote(name)

    def _write_text(self, name: str, text: str) -> None:
        (self.output / name).write_text(text, encoding="utf-8")
        self._wrote(name)

    def _wrote(self, name: str) -> None:
        self.console.print(f"wrote {self.output / name}", highlight=False, soft_wrap=True)
