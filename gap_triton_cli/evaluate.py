"""``gap-triton eval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

import typer

from . import evaluation_options as options
from .choices import SYNTHETIC, VQA, Split
from .console import console
from .refuse import told_as_option
from .ways import Ways

OF_EMBEDDED = "it measures the embedded models"
INSTEAD = {
    "--layers": "use --layer",
    "--scores": "use --score",
    "--samples": "use --limit",
    "--resume": "every run there goes on where it stopped",
}


def evaluate(
    dataset: options.DatasetName = None,
    split_name: options.SplitName = None,
    data: options.Data = None,
    limit: options.Limit = None,
    model: options.Model = None,
    methods: options.Methods = None,
    budgets: options.Budgets = None,
    ids: options.Ids = None,
    output: options.Output = None,
    layer: options.OwnLayer = None,
    score: options.OwnScore = None,
    batch_size: options.BatchSize = None,
    box_format: options.Format = None,
    question: options.QuestionText = None,
    max_new_tokens: options.MaxNewTokens = None,
    device: options.Device = None,
    dtype: options.OwnDtype = None,
    revision: options.OwnRevision = None,
    trust_remote_code: options.OwnTrustRemoteCode = False,
    coverage: options.Coverage = False,
    layers: options.Layers = None,
    scores: options.Scores = None,
    coverages: options.Coverages = None,
    exponents: options.Exponents = None,
    resume: options.Resume = False,
    samples: options.Samples = None,
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
    _refuse_what_belongs_to_the_other(dataset is None, own if dataset is None else embedded)
    if dataset is None:
        scenes = _scenes(split_name)
        from .embedded import evaluate_embedded  # it imports torch, which a refusal need not wait for

        evaluate_embedded(
            "llava" if model is None else model, methods, coverage, {**swept, "--ids": ids},
            options.BUDGETS if budgets is None else budgets, samples or options.SAMPLES, scenes,
            resume, Path(options.OUTPUT) if output is None else output,
        )  # fmt: skip
        return
    if model is None:
        raise typer.BadParameter(
            "--model is missing: with --dataset it is a folder or a hub id, or 'embedded'"
        )
    _refuse_what_the_data_set_has_itself(dataset, data, question, split_name)
    ways = Ways(
        methods,
        options.OWN_BUDGET if budgets is None else budgets,
        options.OWN_IDS if ids is None else ids,
        layer,
        score,
    )
    with told_as_option():
        ways.of(None)  # what is wrong for any model is refused before one is loaded

    from .dataset import DatasetRun, evaluate_dataset
    from .loading import Source

    folder = Path(options.OWN_OUTPUT) if output is None else output
    with told_as_option("--output"):
        folder.mkdir(parents=True, exist_ok=True)
    run = DatasetRun(
        dataset=dataset,
        split=options.OWN_SPLIT if split_name is None else split_name,
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


def _refuse_what_belongs_to_the_other(embedded: bool, given: Mapping[str, object]) -> None:
    """Raise BadParameter if an option is given that only a data set has, or only the ``embedded`` models."""
    wrong = next((option for option, value in given.items() if value is not None), None)
    if wrong is None:
        return
    if embedded:
        raise typer.BadParameter(f"{wrong} belongs to a data set; leave it out, or name one with --dataset")
    raise typer.BadParameter(f"{wrong} does not go with --dataset: {INSTEAD.get(wrong, OF_EMBEDDED)}")


def _refuse_what_the_data_set_has_itself(
    dataset: str, data: Path | None, question: str | None, split_name: str | None
) -> None:
    if dataset == SYNTHETIC and data is not None:
        raise typer.BadParameter("--data does not go with --dataset synthetic, which is made in --output")
    if dataset == VQA:
        if question is not None:
            raise typer.BadParameter("--question does not go with --dataset vqa, which has its own questions")
        if split_name is not None:
            raise typer.BadParameter(
                "--split does not go with --dataset vqa, whose questions are in one file"
            )


def _scenes(name: str | None) -> Split:
    if name is not None and name not in get_args(Split):
        raise typer.BadParameter(
            f"--split {name!r}: expected one of {', '.join(get_args(Split))}, or a data set's own with --dataset"
        )
    return cast("Split", options.SCENES if name is None else name)
