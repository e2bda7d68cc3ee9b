"""Train an embedded model from nothing on a CPU: ``python -m training.train --help``.

Dense attention over every visual token, no pruning of any kind: what the demo shows later is training-free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from gap_triton.demo.architecture import Architecture
from gap_triton.demo.architectures import ARCHITECTURES, LLAVA, find
from gap_triton.demo.grounding import box_iou
from gap_triton.demo.scenes import HELD_OUT_SEED, IMAGE_SIZE, MOST_OBJECTS, Scenes, draw
from gap_triton.demo.vocabulary import LOCATION_TOKENS, LOCATIONS, token_id

from . import curve
from .build import build_model, save
from .naming import naming_loss
from .packing import ANSWER, PREDICTED, Packed, pack, with_wrong_answers
from .schedule import learning_rate, phase_at

SEEDS_PER_RUN = 1_000_000  # a run uses one scene seed per step; runs of different seeds share none
LOG_EVERY = 25  # steps
SAVE_EVERY = 250  # steps
NAMING_WEIGHT = 0.2  # of the naming loss beside the answers
ATTENTION = "gap_demo_matmul"


def matmul_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute what sdpa computes, by two plain matrix products: [B, H, S, D] to [B, S, H, D].

    At this size (185 tokens, 32 channels a head) the backward pass of torch's fused CPU attention in bfloat16 takes
    half of a whole training step; all of this takes less than half of that.
    """
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, matmul_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def answer_logits(architecture: Architecture, model: Any, packed: Packed, features: Tensor) -> Tensor:
    """Return the logits at the supervised positions: [N, M * PREDICTED, vocabulary] float32."""
    words = model.get_input_embeddings()(packed.input_ids)
    output = model(
        inputs_embeds=architecture.splice(words, features),
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        logits_to_keep=packed.predicting,
        use_cache=False,
    )
    return output.logits.float()


def teacher_forced_accuracy(logits: Tensor, scenes: Scenes) -> float:
    """Return the share of the present objects whose most likely location tokens give an IoU of at least 0.5.

    Training scenes never repeat, so before the step that learns from them they are as good as held-out ones.
    """
    first = token_id(LOCATION_TOKENS[0])
    answers = logits.unflatten(1, (MOST_OBJECTS, PREDICTED))[
        :, :, 1 : 1 + ANSWER, first : first + LOCATIONS
    ].argmax(-1)
    right = box_iou(answers / (LOCATIONS - 1), scenes.boxes / IMAGE_SIZE) >= 0.5
    return right[scenes.present].float().mean().item()


def train(
    output: Path,
    architecture: Architecture = LLAVA,
    *,
    steps: int,
    batch: int,
    seed: int = 0,
    stop_at: int | None = None,
    report: Callable[[int, curve.Row | None], None] = lambda done, row: None,
) -> None:
    """Train a model and save it in ``output/model``, going on from ``output/checkpoint.pt`` if there is one.

    Every batch is a function of ``seed`` and the step, and nothing else draws random numbers, so a resumed run
    equals an uninterrupted one bit for bit.

    Args:
        output: Folder for the checkpoint, the log ``training.jsonl`` and the model; created if missing.
        architecture: What to train.
        steps: Length of the whole schedule.
        batch: Scenes per step.
        seed: Of the initial weights and of the scenes.
        stop_at: End after this many steps of the schedule, with a checkpoint; by default all of them.
        report: Called after every step with the number of steps done and, now and then, a row of the log.
    """
    if not 1 <= steps <= SEEDS_PER_RUN:
        raise ValueError(f"steps is {steps}; it must be in 1..{SEEDS_PER_RUN}")
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if not 0 <= seed < HELD_OUT_SEED // SEEDS_PER_RUN:
        raise ValueError(f"seed is {seed}; it must be in 0..{HELD_OUT_SEED // SEEDS_PER_RUN - 1}")
    last = steps if stop_at is None else stop_at
    if not 1 <= last <= steps:
        raise ValueError(f"stop_at is {stop_at}; it must be in 1..{steps}, the number of steps")

    output.mkdir(parents=True, exist_ok=True)
    settings = {"architecture": architecture.name, "steps": steps, "batch": batch, "seed": seed}
    model = build_model(architecture, seed)
    model.set_attn_implementation(ATTENTION)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    start, earlier = _resume(output, settings, model, optimizer)
    began = time.perf_counter()
    for step in range(start, last):
        phase = phase_at(step, steps)
        scenes = draw(batch, seed * SEEDS_PER_RUN + step, fewest=phase.fewest, most=phase.most)
        packed = pack(scenes, architecture)
        with torch.autocast("cpu", torch.bfloat16):
            features = architecture.visual_features(model, packed.pixel_values)
            names, accuracy = naming_loss(features, model.get_input_embeddings().weight, scenes)
            if phase.answers:
                logits = answer_logits(architecture, model, with_wrong_answers(packed, step), features)
        if phase.answers:
            answers = F.cross_entropy(logits.flatten(0, 1), packed.labels.flatten())
            loss = answers + NAMING_WEIGHT * names
            accuracy = teacher_forced_accuracy(logits, scenes)
        else:
            answers = loss = names
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        done = step + 1
        seconds = earlier + time.perf_counter() - began
        row: curve.Row | None = None
        if step % LOG_EVERY == 0 or done == steps:
            row = {
                "step": step,
                "stage": phase.name,
                "loss": round(answers.item(), 4),
                "accuracy": round(accuracy, 4),
                "seconds": round(seconds, 1),
            }
            curve.append(output / "training.jsonl", row)
        if done % SAVE_EVERY == 0 or done == last:
            _checkpoint(output, architecture, settings, model, optimizer, done, seconds)
        report(done, row)


def _checkpoint(
    output: Path,
    architecture: Architecture,
    settings: dict[str, Any],
    model: Any,
    optimizer: torch.optim.Optimizer,
    done: int,
    seconds: float,
) -> None:
    partial = output / "checkpoint.partial"
    state = {"settings": settings, "done": done, "seconds": seconds}
    torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial)
    partial.replace(output / "checkpoint.pt")  # interrupted while writing, the older checkpoint stays whole
    save(architecture, model, output / "model")


def _resume(
    output: Path, settings: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load the checkpoint, if any, and cut the log back to it: steps done, and seconds spent on them."""
    checkpoint, log = output / "checkpoint.pt", output / "training.jsonl"
    if not checkpoint.exists():
        log.unlink(missing_ok=True)
        return 0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    if state["settings"] != settings:
        raise ValueError(
            f"output is {str(output)!r}, which holds a run with {state['settings']}; this one has {settings}: "
            "give the same settings to go on with it, or another folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    rows = [row for row in curve.read(log) if row["step"] < state["done"]]
    log.unlink()
    for row in rows:
        curve.append(log, row)
    return state["done"], state["seconds"]


def main(
    output: Annotated[
        Path,
        typer.Option(help="Folder for the run: checkpoint.pt, training.jsonl, training.png and model/."),
    ],
    architecture: Annotated[
        str, typer.Option(help=f"What to train: {' or '.join(ARCHITECTURES)}.")
    ] = LLAVA.name,
    steps: Annotated[int, typer.Option(help="Length of the schedule.")] = 8000,
    batch: Annotated[int, typer.Option(help="Scenes per step; each is asked about all of its objects.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the first weights and of the training scenes.")] = 0,
) -> None:
    """Train one of the embedded vision-language models from nothing, on a CPU.

    Run it again with the same options to go on after an interruption: it resumes from the last checkpoint, one
    every 250 steps, and ends with exactly the weights of an uninterrupted run.

    Example: python -m training.train --output training-output
    """
    console = Console()
    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("training", total=steps, state="")

        def report(done: int, row: curve.Row | None) -> None:
            progress.update(task, completed=done)
            if row is None:
                return
            state = f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.2f} ({row['stage']})"
            progress.update(task, state=state)
            if not console.is_terminal:
                print(f"step {row['step']}/{steps}: {state}, {row['seconds']:.0f} s", flush=True)

        try:
            train(output, find(architecture), steps=steps, batch=batch, seed=seed, report=report)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    curve.plot(output / "training.jsonl", output / "training.png")
    console.print(f"model: {output / 'model'}, curve: {output / 'training.png'}")


if __name__ == "__main__":
    typer.run(main)
