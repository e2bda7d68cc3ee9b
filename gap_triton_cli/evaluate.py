"""``gap-triton eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from .choices import ARCHITECTURES, SYNTHETIC, VQA, Dataset, DtypeOrSaved, Score, Split
from .console import console
from .parse import parse_keep, parse_layers, parse_numbers, split, split_names
from .refuse import told_as_option

if TYPE_CHECKING:
    from gap_triton.evaluation.ways import Way

# What `gap-triton eval` sweeps by default.
LAYERS, SCORES, COVERAGES, IDS = "-1,0,1,2,3,4", "text", "topk", "kept,compacted,permuted"
EXPONENTS = "1"
BUDGETS, SAMPLES, OUTPUT, SCENES = "0.5,0.25,0.125", 2048, "demo-output", "report"
# With --dataset.
OWN_BUDGET, OWN_IDS, OWN_OUTPUT, OWN_SPLIT = "0.25", "kept,compacted", "eval-output", "val"

OF_EMBEDDED = "it measures the embedded models"
INSTEAD = {
    "--layers": "use --layer",
    "--scores": "use --score",
    "--samples": "use --limit",
    "--resume": "every run there goes on where it stopped",
}
BOTH, OWN, EMBEDDED = (
    "Both",
    "Your model on a data set: with --dataset",
    "The embedded models on their scenes: without --dataset",
)


def evaluate(
    dataset: Annotated[
        Dataset | None,
        typer.Option(
            rich_help_panel=OWN,
            help="refcoco, refcoco+, refcocog; vqa: your questions, answered in words; synthetic: scenes of the embedded "
            "models as files of RefCOCO.",
        ),
    ] = None,
    split_name: Annotated[
        str | None,
        typer.Option(
            "--split",
            rich_help_panel=BOTH,
            help="With --dataset: val (the default), test, testA, testB (refcocog: val, test). Without: held-out scenes, "
            "report (the default; what the docs show), choice (to choose by), development (what tests see), or sealed (for "
            "one last check).",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=OWN,
            help="Folder or parquet file; what to download is said where it is missing. Default: data/DATASET",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=OWN, help="Ask the first so many questions only. It can be raised later."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=BOTH,
            help="With --dataset: folder or hub id, 'embedded' or 'embedded-mrope'. Without: llava (the default), "
            "qwen2_5_vl, or all.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "--method",
            rich_help_panel=BOTH,
            help="Published methods: comma-separated names such as fastv,nuwa, or all. Without it, --layer and --score.",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            "--budgets",
            "--budget",
            "--keeps",
            "--keep",
            rich_help_panel=BOTH,
            help=f"Comma-separated shares or counts of visual tokens. Default: {OWN_BUDGET} with --dataset, else {BUDGETS}",
        ),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=BOTH,
            help=f"Comma-separated position ids. Default: {OWN_IDS} with --dataset, in a sweep {IDS}",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            rich_help_panel=BOTH,
            help=f"Folder for the files; made if missing. Default: {OWN_OUTPUT} with --dataset, else {OUTPUT}",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=OWN, help="Without --method: the layer to prune after; -1: before the decoder."
        ),
    ] = None,
    score: Annotated[
        Score | None, typer.Option(rich_help_panel=OWN, help="Without --method: what ranks a visual token.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=OWN, help="Questions at a time. Default: 8")
    ] = None,
    box_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            rich_help_panel=OWN,
            help="How the model is asked for a box and writes it: llava, llava-next, shares, qwen2-vl, qwen2.5-vl, "
            "qwen3-vl, shikra, minigpt-v2, internvl, paligemma. Default: by the type of the model.",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=OWN, help="Ask this instead of the format's question; {} is the expression."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=OWN, help="Length of an answer at most. Default: 64")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=OWN,
            help="cpu, cuda, cuda:N, or auto, spread over what is there. Default: cuda where there is a GPU, else cpu.",
        ),
    ] = None,
    dtype: Annotated[
        DtypeOrSaved | None,
        typer.Option(
            rich_help_panel=OWN, help="auto: as it was saved. Default: bfloat16 on a GPU, float32 on a CPU."
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(rich_help_panel=OWN, help="Branch, tag or commit of the model. Default: main."),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            rich_help_panel=OWN,
            help="Run the Python code that comes with the model. Read it first.",
        ),
    ] = False,
    coverage: Annotated[
        bool,
        typer.Option(
            "--coverage",
            rich_help_panel=EMBEDDED,
            help="Measure coverage (top-k, region, stride, random) x position ids.",
        ),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=EMBEDDED,
            help="Sweep: comma-separated decoder layers, as in --layers=-1,0,1; -1 = after the vision encoder. Default: "
            f"{LAYERS}",
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=EMBEDDED,
            help="Sweep: comma-separated scores. At -1 those of the decoder become random; those of the vision encoder "
            f"apply at -1 only. Default: {SCORES}",
        ),
    ] = None,
    coverages: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=EMBEDDED, help=f"Sweep: comma-separated coverages. Default: {COVERAGES}"
        ),
    ] = None,
    exponents: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=EMBEDDED,
            help=f"Sweep: comma-separated powers of the score, for coverages that weigh by it. Default: {EXPONENTS}",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=EMBEDDED,
            help="Go on with what a broken-off run of the same code left in --output; otherwise all is measured anew. With "
            "--dataset every run goes on.",
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=EMBEDDED, help=f"Held-out scenes to ask about. Default: {SAMPLES}"
        ),
    ] = None,
) -> None:
    """Measure what pruning costs in accuracy: of your model on RefCOCO or on
    your own questions, or of the embedded models.

    With --dataset, one model is loaded. It answers every question unpruned
    first, then with each method and budget, ids kept (GAP) and compacted.
    Accuracy at IoU 0.5 with paired intervals, answers without a box, visual
    tokens, time to the first token and KV cache come as a table, results.json,
    results.md and cases.png, beside the figures of papers. Answers are saved
    as they come, in answers.jsonl: the same command goes on where it stopped.

    Your model: gap-triton eval --dataset refcoco --split val
    --model llava-hf/llava-1.5-7b-hf --method nuwa --budget 64

    Without a download: gap-triton eval --dataset synthetic --model embedded
    --layer 1 --limit 64

    Without --dataset, the tables of the docs. --methods writes methods.json,
    .md and .png: each preset at each budget, ids kept and compacted. --coverage
    writes coverage.json, .md and .png. Without either, layers x scores x
    coverages x budgets x ids are swept: eval.json and eval.md. What is measured
    goes into measured-MODEL.jsonl at once; runs of different models can share a
    folder, and a last one with --model all --resume makes the tables of all.

    The docs: gap-triton eval --methods all --coverage --model all
    """
    own = {
        "--data": data, "--limit": limit, "--layer": layer, "--score": score, "--batch-size": batch_size,
        "--format": box_format, "--question": question, "--max-new-tokens": max_new_tokens, "--device": device,
        "--dtype": dtype, "--revision": revision, "--trust-remote-code": trust_remote_code or None,
    }  # fmt: skip
    swept = {"--layers": layers, "--scores": scores, "--coverages": coverages, "--exponents": exponents}
    embedded = {**swept, "--coverage": coverage or None, "--samples": samples, "--resume": resume or None}
    wrong = [option for option, value in (own if dataset is None else embedded).items() if value is not None]
    if wrong and dataset is None:
        raise typer.BadParameter(
            f"{wrong[0]} belongs to a data set; leave it out, or name one with --dataset"
        )
    if wrong:
        raise typer.BadParameter(
            f"{wrong[0]} does not go with --dataset: {INSTEAD.get(wrong[0], OF_EMBEDDED)}"
        )
    if dataset is None:
        _evaluate_embedded(
            "llava" if model is None else model, methods, coverage, {**swept, "--ids": ids},
            BUDGETS if budgets is None else budgets, samples or SAMPLES, _scenes(split_name),
            resume, Path(OUTPUT) if output is None else output,
        )  # fmt: skip
        return
    if model is None:
        raise typer.BadParameter(
            "--model is missing: with --dataset it is a folder or a hub id, or 'embedded'"
        )
    if dataset == SYNTHETIC and data is not None:
        raise typer.BadParameter("--data does not go with --dataset synthetic, which is made in --output")
    if dataset == VQA:
        if question is not None:
            raise typer.BadParameter("--question does not go with --dataset vqa, which has its own questions")
        if split_name is not None:
            raise typer.BadParameter(
                "--split does not go with --dataset vqa, whose questions are in one file"
            )
    ways = Ways(
        methods, OWN_BUDGET if budgets is None else budgets, OWN_IDS if ids is None else ids, layer, score
    )
    with told_as_option():
        ways.of(None)  # what is wrong for any model is refused before one is loaded

    from .dataset import DatasetRun, evaluate_dataset
    from .loading import Source

    folder = Path(OWN_OUTPUT) if output is None else output
    with told_as_option("--output"):
        folder.mkdir(parents=True, exist_ok=True)
    run = DatasetRun(
        dataset=dataset,
        split=OWN_SPLIT if split_name is None else split_name,
        data=data,
        limit=limit,
        source=Source(model, dtype, device, revision, trust_remote_code),
        ways_for=ways.of,
        format=box_format,
        question=question,
        batch_size=batch_size or 8,
        max_new_tokens=max_new_tokens or 64,
        output=folder,
    )
    with told_as_option():
        try:
            evaluate_dataset(run, console)
        except KeyboardInterrupt:
            console.print(
                f"stopped; {folder / 'answers.jsonl'} has the answers so far, and the same command goes on from there",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from None


@dataclass(frozen=True)
class Ways:
    """What the options say of pruning on a data set."""

    methods: str | None
    budgets: str
    ids: str
    layer: int | None
    score: Score | None

    def of(self, model: Any) -> list[Way]:
        """Return the ways to run ``model``, or any model: None.

        Raises:
            ValueError: A value is out of range, or does not go with this model.
        """
        from gap_triton.evaluation.ways import ways_of
        from gap_triton.presets import PRESETS

        axes = {
            name: value for name, value in (("layer", self.layer), ("score", self.score)) if value is not None
        }
        if self.methods is not None and axes:
            raise typer.BadParameter(f"--{next(iter(axes))} is part of a method: leave it out, or --method")
        names: list[str | None] = [None]
        if self.methods is not None:
            names = list(split_names("--methods", self.methods, PRESETS))
        return ways_of(model, names, _budgets(self.budgets), split(self.ids), **axes)


def _budgets(text: str) -> list[float | int]:
    shares = [parse_keep(item, "--budgets") for item in split(text)]
    if any(isinstance(share, float) and share == 1.0 for share in shares):
        raise typer.BadParameter("--budgets 1.0 drops nothing; no pruning is always the first row")
    return shares


def _scenes(name: str | None) -> Split:
    if name is not None and name not in get_args(Split):
        raise typer.BadParameter(
            f"--split {name!r}: expected one of {', '.join(get_args(Split))}, or a data set's own with --dataset"
        )
    return cast("Split", SCENES if name is None else name)


def _evaluate_embedded(
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
    from gap_triton.demo.evaluation import Evaluation, sweep_configs
    from gap_triton.demo.scenes import seeds_of
    from gap_triton.presets import PRESETS

    sweeps = methods is None and not coverage
    # In a sweep ids may be wrong with nothing dropped.
    shares = [parse_keep(item, "--budgets") for item in split(budgets)] if sweeps else _budgets(budgets)
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
