"""``gap-triton eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .choices import ARCHITECTURES, Split
from .console import console
from .parse import parse_keep, parse_layers, parse_numbers, split, split_names
from .refuse import told_as_option

# What `gap-triton eval` sweeps by default.
LAYERS, SCORES, COVERAGES, IDS = "-1,0,1,2,3,4", "text", "topk", "kept,compacted,permuted"
EXPONENTS = "1"


def evaluate(
    model: Annotated[str, typer.Option(help="Embedded model: llava, qwen2_5_vl, or all.")] = "llava",
    methods: Annotated[
        str | None,
        typer.Option(help="Measure presets: all, or comma-separated names such as fastv,nuwa."),
    ] = None,
    coverage: Annotated[
        bool,
        typer.Option("--coverage", help="Measure coverage (top-k, region, stride, random) x position ids."),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Sweep: comma-separated decoder layers, as in --layers=-1,0,1; -1 = after the vision encoder. Default: "
            f"{LAYERS}",
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            help="Sweep: comma-separated scores. At -1 those of the decoder become random; those of the vision encoder "
            f"apply at -1 only. Default: {SCORES}",
        ),
    ] = None,
    coverages: Annotated[
        str | None,
        typer.Option(help=f"Sweep: comma-separated coverages. Default: {COVERAGES}"),
    ] = None,
    exponents: Annotated[
        str | None,
        typer.Option(
            help="Sweep: comma-separated powers of the score, for coverages that weigh by it. Default: 1"
        ),
    ] = None,
    ids: Annotated[
        str | None, typer.Option(help=f"Sweep: comma-separated position ids. Default: {IDS}")
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", "--keeps", help="Comma-separated shares or counts of visual tokens.")
    ] = "0.5,0.25,0.125",
    samples: Annotated[int, typer.Option(min=1, help="Held-out scenes to ask about.")] = 2048,
    scenes: Annotated[
        Split,
        typer.Option(
            "--split",
            help="Which held-out scenes: report (what the docs show), choice (to choose by), development (what tests see), "
            "or sealed (for one last check).",
        ),
    ] = "report",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with what a broken-off run of the same code left in --output; otherwise all is measured anew.",
        ),
    ] = False,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the files; made if missing.")
    ] = Path("demo-output"),
) -> None:
    """Measure the embedded models by real generation: the tables of the docs.

    --methods writes methods.json, .md and .png: each preset at each budget, ids kept and compacted. --coverage writes
    coverage.json, .md and .png. Without either, layers x scores x coverages x budgets x ids are swept: eval.json and
    eval.md. What is measured goes into measured-MODEL.jsonl at once; runs of different models can share a folder, and a
    last one with --model all --resume makes the tables of all.

    Example: gap-triton eval --methods all --coverage --model all
    """
    from gap_triton.demo.evaluation import Evaluation, sweep_configs
    from gap_triton.demo.scenes import seeds_of
    from gap_triton.presets import PRESETS

    shares = [parse_keep(item, "--budgets") for item in split(budgets)]
    swept = {
        "--layers": layers,
        "--scores": scores,
        "--coverages": coverages,
        "--exponents": exponents,
        "--ids": ids,
    }
    given = [option for option, value in swept.items() if value is not None]
    if given and (methods is not None or coverage):
        raise typer.BadParameter(
            f"{given[0]} belongs to the sweep; leave it out, or --methods and --coverage"
        )
    if (methods is not None or coverage) and any(
        isinstance(share, float) and share == 1.0 for share in shares
    ):
        raise typer.BadParameter("--budgets 1.0 drops nothing; no pruning is always the first row")
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
    if methods is None and not coverage:
        with told_as_option("--layers, --scores, --coverages, --exponents, --ids, --budgets"):
            evaluation.add_sweep(
                sweep_configs(
                    parse_layers(LAYERS if layers is None else layers),
                    split(SCORES if scores is None else scores),
                    shares,
                    split(IDS if ids is None else ids),
                    split(COVERAGES if coverages is None else coverages),
                    parse_numbers("--exponents", EXPONENTS if exponents is None else exponents),
                )
            )
    with told_as_option("--output"):
        output.mkdir(parents=True, exist_ok=True)
    with told_as_option("--resume"):
        log = evaluation.open_log(resume)
    evaluation.run(log)
