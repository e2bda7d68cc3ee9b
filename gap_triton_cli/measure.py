"""Loading what ``gap-triton bench`` measures, measuring it, and saying what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gap_triton import GapConfig
from gap_triton.clock import clock_of
from gap_triton.environment import device_name, environment
from gap_triton.introspect import visual_token_ids
from gap_triton.latency import Subject, measure, random_subject, variants_of
from gap_triton.latency.graphs import captured_variants, refuse_what_is_not_captured, refuse_without_cuda
from gap_triton.latency.measure import check_all
from gap_triton.latency.report import bytes_in_words, ratios_of, rows_of, table_of, verdict
from gap_triton.latency.rivals import rivals_of

from .loading import Source, torch_device
from .prompts import inputs_of, with_images

NOISE_SIZE = 336


@dataclass(frozen=True)
class Run:
    """What to measure, as the options say it."""

    model: str | None
    config: str | None
    image: Image.Image | None
    prompt: str
    visual_tokens: int | None
    config_for: Callable[[Any], GapConfig]
    batch: int
    static: bool
    compiled: bool
    output_len: int
    rounds: int
    device: str | None
    dtype: str | None
    revision: str | None
    trust_remote_code: bool
    threads: int | None
    json: Path | None
    graph: bool = False
    rivals: bool = False


def load(run: Run, device: torch.device, dtype: torch.dtype) -> Subject:
    """Build or load the model, and make its inputs.

    Raises:
        ValueError: There is no such model, it can't be loaded, or takes no such image.
    """
    if run.config is not None:
        return random_subject(
            run.config, visual_tokens=run.visual_tokens, batch=run.batch, device=device, dtype=dtype
        )
    assert run.model is not None
    source = Source(run.model, run.dtype, run.device, run.revision, run.trust_remote_code)
    _, processor = source.load_processor()
    model = source.load_model("sdpa")
    embedded = source.embedded
    image = run.image or Image.effect_noise((NOISE_SIZE, NOISE_SIZE), 64).convert("RGB")
    text = with_images(processor, run.prompt, 1, None if embedded is None else embedded.image_text)
    inputs = inputs_of(processor, [text] * run.batch, [image] * run.batch, [], embedded).to(device, dtype)
    visual = torch.isin(inputs["input_ids"][0], torch.tensor(visual_token_ids(model.config), device=device))
    return Subject(source.name, model, dict(inputs), int(visual.sum()))


def run(run: Run, console: Console) -> None:
    """Measure, print a table and what it means, and write the numbers.

    Raises:
        ValueError: What was asked for can't be measured, or the pruned logits are wrong.
    """
    device = torch_device(run.device)
    if run.graph:
        refuse_without_cuda(device)
        refuse_what_is_not_captured(run.config_for(None))
    usual = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, run.dtype or usual)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    with console.status("building the model" if run.model is None else "loading the model"):
        subject = load(run, device, dtype)
        config = run.config_for(subject.model)
        steps = run.output_len + 8
        variants = variants_of(subject, config, steps=steps, static=run.static, compile_steps=run.compiled)
        if run.graph:
            variants += captured_variants(subject, config, steps=steps)
        error = check_all(variants)
        rivals, absent = (
            rivals_of(subject, {each.name: each for each in variants}) if run.rivals else ([], {})
        )
        variants += rivals
    console.print(
        f"{subject.name}, {str(dtype).removeprefix('torch.')} on {device_name(device)}: "
        f"{subject.visual_tokens} visual tokens in a prompt of {subject.prompt_tokens}, batch {subject.batch}\n"
        f"keep {config.keep} {'before the decoder' if config.layer < 0 else f'after layer {config.layer}'}, "
        f"{'static' if run.static else 'dynamic'} KV cache{', compiled steps' if run.compiled else ''}"
        f"{', CUDA graphs on static ones' if run.graph else ''}\n"
        f"logits agree with the oracle's: largest difference {error:.1e} of the largest logit",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    total = len(variants) * (1 + run.rounds + run.output_len)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("warm-up", total=total)
        found = measure(
            variants,
            rounds=run.rounds,
            steps=run.output_len,
            device=device,
            progress=lambda what, done: bar.update(task, description=what, advance=done),
        )
    console.print()
    console.print(table_of(found, subject.batch))
    words = verdict(found, static=run.static, compiled=run.compiled)
    console.print(
        "launches of kernels, and waits of the host for the device: in a prefill, in a step. Peak memory: without weights",
        style="dim", soft_wrap=True,
    )  # fmt: skip
    console.print()
    for sentence in words:
        console.print(sentence, highlight=False, soft_wrap=True)
    saved = 1 - found["pruned"].kv_bytes / found["sdpa"].kv_bytes
    console.print(
        f"KV cache {saved:.0%} smaller: {bytes_in_words(found['pruned'].kv_bytes)}", highlight=False
    )
    for name, why in absent.items():
        console.print(f"{name} is not in the table: {why}", highlight=False, soft_wrap=True)
    if run.json is not None:
        report = {
            "environment": environment(),
            "device": device_name(device),
            "clock": clock_of(device).__name__,
            "dtype": str(dtype).removeprefix("torch."),
            "model": subject.name,
            "pruned": {"keep": config.keep, "layer": config.layer, "score": config.score},
            "batch": subject.batch,
            "prompt_tokens": subject.prompt_tokens,
            "visual_tokens": subject.visual_tokens,
            "cache": "static" if run.static else "dynamic",
            "compiled": run.compiled,
            "graphs": run.graph,
            "error": error,
            "rows": rows_of(found),
            "faster": {
                name: {what: vars(each) for what, each in pair.items()}
                for name, pair in ratios_of(found).items()
            },
            "verdict": words,
            "absent": absent,
        }
        run.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {run.json}", highlight=False, soft_wrap=True)
