"""The demo: the embedded model on held-out scenes, pruned with and without GAP; table, pictures, JSON."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

import gap_triton

from .. import GapConfig
from ..config import Ids, Score
from ..environment import default_device, device_name
from .architectures import LLAVA, find
from .grounding import answer_boxes
from .jobs import Job, run_jobs
from .report import can_draw, table_of, write_results
from .scenes import GRID, IMAGE_SIZE, Split, held_out
from .table import Case, Row

if TYPE_CHECKING:
    from .pictures import Example

LAYER = 1  # of 6: early, before the decoder has carried positions into other tokens
SCORE: Score = "text"  # in an early layer, all words of the question rank better than the last token alone
KEEPS = (0.5, 0.25, 0.125)
IDS: tuple[Ids, ...] = ("kept", "compacted", "permuted")
SPLIT: Split = "report"
SHOWN = 4  # scenes in the overlay: the first held-out ones, not chosen
SHOWN_KEEP = 0.5


def load_embedded_model(device: torch.device | None = None, name: str = LLAVA.name) -> tuple[Any, Any]:
    """Load an embedded model under ``"gap_triton"``, and its processor, through the public API of transformers.

    Args:
        device: Where to put the model; None = the best there is.
        name: Its architecture, ``"llava"`` or ``"qwen2_5_vl"``.
    """
    architecture = find(name)
    model = AutoModelForImageTextToText.from_pretrained(architecture.folder, attn_implementation="gap_triton")
    return model.to(device or default_device()), architecture.load_processor(architecture.folder)


def demo_configs() -> list[GapConfig]:
    """Return the rows of the demo's table below no pruning."""
    return [GapConfig(keep=keep, layer=LAYER, score=SCORE, ids=ids) for keep, ids in product(KEEPS, IDS)]


def run_demo(output: Path, samples: int, console: Console) -> list[Row]:
    """Run everything and write ``results.json``, ``overlay.png`` and ``accuracy.png`` into ``output``.

    Without matplotlib there are no pictures, but a message.
    """
    output.mkdir(parents=True, exist_ok=True)
    device = default_device()
    model, processor = load_embedded_model(device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"Embedded model: {type(model).__name__}, {parameters / 1e6:.2f} M parameters, {GRID} x {GRID} visual tokens, "
        f"on {device_name(device)}"
    )
    cases = [Case.of(config) for config in demo_configs()]
    ((rows, _),) = run_jobs(console, held_out(samples, SPLIT), [Job(model, processor, cases)])
    console.print(
        table_of(rows, f"Grounding on {samples} held-out scenes, tokens dropped after decoder layer {LAYER}")
    )

    write_results(output / "results.json", samples, SPLIT, device, rows=rows)
    files = ["results.json"]
    if can_draw(console, "overlay.png", "accuracy.png"):
        from .pictures import save_bars, save_overlay

        save_overlay(
            examples(model, processor),
            f"First {SHOWN} held-out scenes, {SHOWN_KEEP:.0%} kept",
            output / "overlay.png",
        )
        title = f"Accuracy on {samples} held-out scenes, pruned after decoder layer {LAYER}"
        save_bars(rows, title, output / "accuracy.png")
        files += ["overlay.png", "accuracy.png"]
    for name in files:
        console.print(f"wrote {output / name}", highlight=False, soft_wrap=True)
    return rows


def examples(model: Any, processor: Any) -> list[Example]:
    """Return the first held-out scenes with what is kept of them, and the boxes answered with and without GAP."""
    from .pictures import Example, kept_grid

    scenes = held_out(SHOWN)
    boxes = {"truth": scenes.target_boxes / IMAGE_SIZE}
    pair: tuple[Ids, ...] = ("kept", "compacted")
    for ids in pair:
        gap_triton.configure(model, GapConfig(keep=SHOWN_KEEP, layer=LAYER, score=SCORE, ids=ids))
        boxes[ids] = answer_boxes(model, processor, scenes)
    selection = gap_triton.last_selection(model)
    assert selection is not None  # a pruned prefill has just run
    return [
        Example(
            image=scenes.images[i],
            title=scenes.question(i),
            kept=kept_grid(selection, i, GRID),
            boxes={label: of_label[i] for label, of_label in boxes.items()},
        )
        for i in range(SHOWN)
    ]
