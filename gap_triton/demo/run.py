"""The demo: the embedded model on held-out scenes, pruned with and without GAP; table, pictures, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForImageTextToText

import gap_triton
from gap_triton import GapConfig
from gap_triton.config import Ids, Score
from gap_triton.demo.architectures import LLAVA, find
from gap_triton.demo.grounding import answer_boxes
from gap_triton.demo.pictures import Example, kept_grid, save_bars, save_overlay
from gap_triton.demo.scenes import GRID, IMAGE_SIZE, Scenes, held_out
from gap_triton.demo.table import IOU_THRESHOLD, Row, measure
from gap_triton.environment import default_device, device_name, installed_versions

MODEL_PATH = LLAVA.folder  # of the model that the demo shows

LAYER = 1  # of 6: early, before the decoder has carried positions into other tokens
SCORE: Score = "text"  # so early, the words that name the thing tell more than the last token alone
KEEPS = (0.5, 0.25, 0.125)
IDS: tuple[Ids, ...] = ("kept", "compacted", "permuted")
SHOWN = 4  # scenes in the overlay: the first held-out ones, not chosen
SHOWN_KEEP = 0.5


def load_embedded_model(device: torch.device | None = None, name: str = LLAVA.name) -> tuple[Any, Any]:
    """Load an embedded model under ``"gap_triton"``, and its processor, through the public API of transformers.

    Args:
        device: where to put the model; None = the best there is.
        name: its architecture, ``"llava"`` or ``"qwen2_5_vl"``.
    """
    architecture = find(name)
    model = AutoModelForImageTextToText.from_pretrained(architecture.folder, attn_implementation="gap_triton")
    return model.to(device or default_device()), architecture.load_processor(architecture.folder)


def demo_configs() -> list[GapConfig]:
    """The rows of the demo's table below no pruning."""
    return [GapConfig(keep=keep, layer=LAYER, score=SCORE, ids=ids) for keep, ids in product(KEEPS, IDS)]


def run_table(
    console: Console, model: Any, processor: Any, scenes: Scenes, configs: Sequence[GapConfig]
) -> list[Row]:
    """Measure all rows, with a progress bar."""
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("timing prefills", total=len(scenes) * (len(configs) + 1))
        rows, _ = measure(
            model,
            processor,
            scenes,
            configs,
            progress=lambda name, done: bar.update(task, advance=done, description=name),
        )
        bar.update(task, description="done")
    return rows


def run_demo(output: Path, samples: int, console: Console) -> list[Row]:
    """Run everything and write ``results.json``, ``overlay.png`` and ``accuracy.png`` into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    device = default_device()
    model, processor = load_embedded_model(device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"Embedded model: {type(model).__name__}, {parameters / 1e6:.2f} M parameters, {GRID} x {GRID} visual tokens, "
        f"on {device_name(device)}"
    )
    rows = run_table(console, model, processor, held_out(samples), demo_configs())
    console.print(
        table_of(rows, f"Grounding on {samples} held-out scenes, tokens dropped after decoder layer {LAYER}")
    )

    title = f"Accuracy on {samples} held-out scenes, pruned after decoder layer {LAYER}"
    save_bars(rows, title, output / "accuracy.png")
    save_overlay(
        examples(model, processor),
        f"First {SHOWN} held-out scenes, {SHOWN_KEEP:.0%} kept",
        output / "overlay.png",
    )
    write_results(rows, samples, device, output / "results.json")
    for name in ("results.json", "overlay.png", "accuracy.png"):
        console.print(f"wrote {output / name}", highlight=False, soft_wrap=True)
    return rows


def examples(model: Any, processor: Any) -> list[Example]:
    """The first held-out scenes with what is kept of them, and the boxes answered with and without GAP."""
    scenes = held_out(SHOWN)
    boxes = {"truth": scenes.target_boxes / IMAGE_SIZE}
    pair: tuple[Ids, ...] = ("kept", "compacted")
    for ids in pair:
        gap_triton.configure(model, GapConfig(keep=SHOWN_KEEP, layer=LAYER, score=SCORE, ids=ids))
        boxes[ids] = answer_boxes(model, processor, scenes)
    selection = gap_triton.last_selection(model)
    assert selection is not None
    return [
        Example(
            image=scenes.images[i],
            title=scenes.question(i),
            kept=kept_grid(selection, i, GRID),
            boxes={label: of_label[i] for label, of_label in boxes.items()},
        )
        for i in range(SHOWN)
    ]


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table for the terminal, with a line before each new method and share."""
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("tokens", "position ids"):
        table.add_column(name, no_wrap=True)
    for name in ("accuracy (95% CI)", "mean IoU", "prefill", "KV cache"):
        table.add_column(name, justify="right", no_wrap=True)
    methods = {row.method for row in rows[1:]}
    previous = rows[0]
    for row in rows:
        if (row.method, row.keep) != (previous.method, previous.keep):
            table.add_section()
        if row.method != previous.method and len(methods) > 1:
            table.add_row(f"[bold]{row.method}[/bold]")
        previous = row
        table.add_row(
            f"{row.tokens_kept} ({row.keep:.3g})" if row.keep < 1 else str(row.tokens_kept),
            "no pruning" if row.method == "no pruning" else {"kept": "kept (GAP)"}.get(row.ids, row.ids),
            f"{row.accuracy:.3f} ({row.accuracy_low:.3f}-{row.accuracy_high:.3f})",
            f"{row.mean_iou:.3f}",
            f"{row.prefill_ratio:.2f}x",
            f"{row.kv_bytes / 1024:.0f} KiB",
        )
    table.caption = (
        f"tokens: visual tokens kept, of {rows[0].tokens_kept}; accuracy: IoU >= {IOU_THRESHOLD} of the answered box; "
        "prefill: its time, vision tower included, relative to no pruning; KV cache: of one prompt"
    )
    return table


def write_results(rows: Sequence[Row], samples: int, device: torch.device, path: Path) -> None:
    """Write the rows with all that is needed to place them."""
    results = {
        "rows": [row.as_dict() for row in rows],
        "samples": samples,
        "iou_threshold": IOU_THRESHOLD,
        "versions": installed_versions(),
        "device": device_name(device),
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def markdown_of(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, for the docs."""
    lines = [
        "| method | keep | visual tokens | ids | accuracy (95% interval) | mean IoU | prefill time | KV cache |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.method,
            f"{row.keep:.1%}",
            str(row.tokens_kept),
            "" if row.method == "no pruning" else row.ids,
            f"{row.accuracy:.3f} ({row.accuracy_low:.3f} to {row.accuracy_high:.3f})",
            f"{row.mean_iou:.3f}",
            f"{row.prefill_ratio:.2f}x",
            f"{row.kv_bytes / 1024:.0f} KiB",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
