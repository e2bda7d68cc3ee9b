"""The embedded models on their scenes, for ``gap-triton eval`` without a data set."""

from __future__ import annotations

from pathlib import Path

import typer

from gap_triton.demo.evaluation import Evaluation, sweep_configs
from gap_triton.demo.scenes import seeds_of
from gap_triton.presets import PRESETS

from .choices import ARCHITECTURES, Split
from .console import console
from .evaluation_options import COVERAGES, EXPONENTS, IDS, LAYERS, SCORES
from .parse import parse_keep, parse_layers, parse_numbers, split, split_names
from .refuse import told_as_option
from .ways import budgets_of


def evaluate_embedded(
    model: str,
    methods: str | None,
    coverage: bool,
    swept: dict[str, str | None],
    budgets: str,
    samples: int,
    scenes: Split,
    resume: bool,
    output: Path,
) -> None:
    """Measure the embedded models: the tables of the docs."""
    sweeps = methods is None and not coverage
    # In a sweep ids may be wrong with nothing dropped.
    shares = [parse_keep(item, "--budgets") for item in split(budgets)] if sweeps else budgets_of(budgets)
    given = {option: value for option, value in swept.items() if value is not None}
    if given and not sweeps:
        raise typer.BadParameter(
            f"{next(iter(given))} belongs to the sweep; leave it out, or --methods and --coverage"
        )
    names = split_names("--methods", "all" if methods is None else methods, PRESETS)
    with told_as_option("--split, --samples"):
        seeds_of(samples, scenes)
    with told_as_option("--model"):
        models = split_names("--model", model, ARCHITECTURES)
        evaluation = Evaluation(console, output, samples, models, scenes)
    if methods is not None:
        with told_as_option("--methods"):
            evaluation.add_methods(names, shares)
    if coverage:
        with told_as_option("--coverage"):
            evaluation.add_coverage(shares)
    if sweeps:
        with told_as_option("--layers, --scores, --coverages, --exponents, --ids, --budgets"):
            evaluation.add_sweep(
                sweep_configs(
                    parse_layers(given.get("--layers", LAYERS)),
                    split(given.get("--scores", SCORES)),
                    shares,
                    split(given.get("--ids", IDS)),
                    split(given.get("--coverages", COVERAGES)),
                    parse_numbers("--exponents", given.get("--exponents", EXPONENTS)),
                )
            )
    with told_as_option("--output"):
        output.mkdir(parents=True, exist_ok=True)
    with told_as_option("--resume"):
        log = evaluation.open_log(resume)
    evaluation.run(log)
