"""Options of ``gap-triton eval``: those of a data set, those of the embedded models, and those of both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .choices import Dataset, DtypeOrSaved, Score

# What `gap-triton eval` sweeps by default.
LAYERS, SCORES, COVERAGES, IDS = "-1,0,1,2,3,4", "text", "topk", "kept,compacted,permuted"
EXPONENTS = "1"
BUDGETS, SAMPLES, OUTPUT, SCENES = "0.5,0.25,0.125", 2048, "demo-output", "report"
# With --dataset.
OWN_BUDGET, OWN_IDS, OWN_OUTPUT, OWN_SPLIT = "0.25", "kept,compacted", "eval-output", "val"

BOTH, OWN, EMBEDDED = (
    "Both",
    "Your model on a data set: with --dataset",
    "The embedded models on their scenes: without --dataset",
)

DatasetName = Annotated[
    Dataset | None,
    typer.Option(
        rich_help_panel=OWN,
        help="refcoco, refcoco+, refcocog; vqa: your questions, answered in words; synthetic: scenes of the embedded "
        "models as files of RefCOCO.",
    ),
]
SplitName = Annotated[
    str | None,
    typer.Option(
        "--split",
        rich_help_panel=BOTH,
        help="With --dataset: val (the default), test, testA, testB (refcocog: val, test). Without: held-out scenes, "
        "report (the default; what the docs show), choice (to choose by), development (what tests see), or sealed (for "
        "one last check).",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=OWN,
        help="Folder or parquet file; what to download is said where it is missing. Default: data/DATASET",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, rich_help_panel=OWN, help="Ask the first so many questions only. It can be raised later."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=BOTH,
        help="With --dataset: folder or hub id, 'embedded' or 'embedded-mrope'. Without: llava (the default), "
        "qwen2_5_vl, or all.",
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        "--method",
        rich_help_panel=BOTH,
        help="Published methods: comma-separated names such as fastv,nuwa, or all. Without it, --layer and --score.",
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--budgets",
        "--budget",
        "--keeps",
        "--keep",
        rich_help_panel=BOTH,
        help=f"Comma-separated shares or counts of visual tokens. Default: {OWN_BUDGET} with --dataset, else {BUDGETS}",
    ),
]
Ids = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=BOTH,
        help=f"Comma-separated position ids. Default: {OWN_IDS} with --dataset, in a sweep {IDS}",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        rich_help_panel=BOTH,
        help=f"Folder for the files; made if missing. Default: {OWN_OUTPUT} with --dataset, else {OUTPUT}",
    ),
]
OwnLayer = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=OWN, help="Without --method: the layer to prune after; -1: before the decoder."
    ),
]
OwnScore = Annotated[
    Score | None, typer.Option(rich_help_panel=OWN, help="Without --method: what ranks a visual token.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=OWN, help="Questions at a time. Default: 8")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        rich_help_panel=OWN,
        help="How the model is asked for a box and writes it: llava, llava-next, shares, qwen2-vl, qwen2.5-vl, "
        "qwen3-vl, shikra, minigpt-v2, internvl, paligemma. Default: by the type of the model.",
    ),
]
QuestionText = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OWN, help="Ask this instead of the format's question; {} is the expression."
    ),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=OWN, help="Length of an answer at most. Default: 64")
]
Device = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=OWN,
        help="cpu, cuda, cuda:N, or auto, spread over what is there. Default: cuda where there is a GPU, else cpu.",
    ),
]
OwnDtype = Annotated[
    DtypeOrSaved | None,
    typer.Option(
        rich_help_panel=OWN, help="auto: as it was saved. Default: bfloat16 on a GPU, float32 on a CPU."
    ),
]
OwnRevision = Annotated[
    str | None,
    typer.Option(rich_help_panel=OWN, help="Branch, tag or commit of the model. Default: main."),
]
OwnTrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        rich_help_panel=OWN,
        help="Run the Python code that comes with the model. Read it first.",
    ),
]
Coverage = Annotated[
    bool,
    typer.Option(
        "--coverage",
        rich_help_panel=EMBEDDED,
        help="Measure coverage (top-k, region, stride, random) x position ids.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=EMBEDDED,
        help="Sweep: comma-separated decoder layers, as in --layers=-1,0,1; -1 = after the vision encoder. Default: "
        f"{LAYERS}",
    ),
]
Scores = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=EMBEDDED,
        help="Sweep: comma-separated scores. At -1 those of the decoder become random; those of the vision encoder "
        f"apply at -1 only. Default: {SCORES}",
    ),
]
Coverages = Annotated[
    str | None,
    typer.Option(rich_help_panel=EMBEDDED, help=f"Sweep: comma-separated coverages. Default: {COVERAGES}"),
]
Exponents = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=EMBEDDED,
        help=f"Sweep: comma-separated powers of the score, for coverages that weigh by it. Default: {EXPONENTS}",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        rich_help_panel=EMBEDDED,
        help="Go on with what a broken-off run of the same code left in --output; otherwise all is measured anew. With "
        "--dataset every run goes on.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=EMBEDDED, help=f"Held-out scenes to ask about. Default: {SAMPLES}"),
]
