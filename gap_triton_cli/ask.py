"""Questions about images and videos to one model, for ``gap-triton run``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gap_triton
from gap_triton import GapConfig
from gap_triton.introspect import visual_token_ids
from gap_triton.latency.report import bytes_in_words

from .generate import Answer, Sampling, generate
from .loading import Source, torch_device
from .overlay import check_overlay, save_kept_tokens
from .prompts import inputs_of, with_images
from .questions import Question

WARM_UP = Sampling(max_new_tokens=2)


@dataclass(frozen=True)
class Show:
    """What is shown of an answer.

    Attributes:
        compare: Whether the model answers without pruning too, first.
        as_json: Whether an object a line is printed, and nothing else.
        overlay: Where to write a picture of the kept tokens, None = nowhere.
    """

    compare: bool = False
    as_json: bool = False
    overlay: Path | None = None


@dataclass(frozen=True)
class Kept:
    """What a prompt had and what pruning left of it.

    Attributes:
        visual_tokens: Visual tokens of the prompt.
        stages: Of each stage the layer behind which it drops, -1 before the decoder, and how many it left; empty where
            nothing was dropped.
        ids: Position ids of the survivors.
    """

    visual_tokens: int
    stages: tuple[tuple[int, int], ...]
    ids: str

    def __str__(self) -> str:
        if not self.stages:
            return f"nothing dropped of {self.visual_tokens} visual tokens"
        places = ["before the decoder" if layer < 0 else f"after layer {layer}" for layer, _ in self.stages]
        counts = [str(count) for _, count in self.stages]
        counts[0] += f" of {self.visual_tokens} visual tokens"
        kept = ", ".join(f"{count} {place}" for count, place in zip(counts, places, strict=True))
        return f"kept {kept}, ids {self.ids}"


def ask(
    source: Source,
    questions: Sequence[Question],
    config_for: Callable[[Any], GapConfig],
    sampling: Sampling,
    show: Show,
    console: Console,
) -> None:
    """Load a model, answer each question with pruning, and print what was kept and what it took.

    Args:
        source: Which model, and how it is loaded.
        questions: What to ask, each on its own. Image tokens are put in front where they are missing, through the chat
            template where the processor has one.
        config_for: What to prune in a model that has been loaded.
        sampling: How tokens are chosen.
        show: What to print and write.
        console: Where to print.

    Raises:
        ValueError: There is no such model or device, it can't be loaded or pruned, a prompt has image tokens for another
            number of images, or ``show.overlay`` is given and its tokens can't be drawn.
        ImportError: Its processor needs a package that is not installed.
    """
    torch_device(source.device)
    config, processor = source.load_processor()
    if show.overlay is not None:
        check_overlay(config)
    image_text = None if source.embedded is None else source.embedded.image_text
    texts = [
        with_images(processor, each.prompt, len(each.images), image_text, len(each.videos))
        for each in questions
    ]
    model = source.load_model("gap_triton")
    pruning = config_for(model)
    for number, (question, text) in enumerate(zip(questions, texts, strict=True)):
        inputs = inputs_of(processor, text, question.open_images(), question.open_videos(), source.embedded)
        inputs = inputs.to(model.device, model.dtype)
        if show.compare and not number:
            for variant in (None, pruning):  # what a first call compiles and allocates is not timed
                answer_with(variant, model, processor, inputs, WARM_UP, streamed=False)
        if len(questions) > 1 and not show.as_json:
            named = ", ".join(path.name for path in (*question.images, *question.videos))
            console.print(f"{named}: {question.prompt}", style="dim", markup=False, highlight=False)
        streamed = not show.as_json
        unpruned = answer_with(None, model, processor, inputs, sampling, streamed) if show.compare else None
        answer = answer_with(pruning, model, processor, inputs, sampling, streamed)
        kept = what_was_kept(model, inputs, pruning)
        if show.as_json:
            print(json.dumps(as_fields(question, pruning, kept, answer, unpruned)), flush=True)
        else:
            console.print(f"{kept}", style="dim", highlight=False)
            console.print(table_of(unpruned, answer) if unpruned else in_words(answer), style="dim")
        if show.overlay is not None:
            selection = gap_triton.last_selection(model)
            if selection is None:
                raise ValueError(
                    f"overlay: nothing was dropped at keep={pruning.keep}; leave the overlay out"
                )
            save_kept_tokens(model, processor, inputs, selection, answer.text, show.overlay)
            if not show.as_json:
                console.print(f"wrote {show.overlay}", highlight=False, soft_wrap=True)


def answer_with(
    config: GapConfig | None, model: Any, processor: Any, inputs: Any, sampling: Sampling, streamed: bool
) -> Answer:
    """Answer with this pruning, or by the model as it is without `gap_triton`: None."""
    model.set_attn_implementation("sdpa" if config is None else "gap_triton")
    if config is not None:
        gap_triton.configure(model, config)  # switching back brings the default
    return generate(model, processor, inputs, sampling, streamed)


def what_was_kept(model: Any, inputs: Any, config: GapConfig) -> Kept:
    """What the last answer of a model was made from."""
    placeholders = torch.tensor(visual_token_ids(model.config), device=inputs["input_ids"].device)
    visual = int(torch.isin(inputs["input_ids"], placeholders).sum())
    counts: list[int] = []
    stage = gap_triton.last_selection(model)
    while stage is not None:
        counts.insert(0, stage.visual_index.shape[1])
        stage = stage.before
    layers = [each.layer for each in config.stages][: len(counts)]
    return Kept(visual, tuple(zip(layers, counts, strict=True)), config.ids)


def as_fields(
    question: Question, config: GapConfig, kept: Kept, answer: Answer, unpruned: Answer | None
) -> dict[str, Any]:
    """What ``--json`` prints of one answer; times in seconds."""
    fields: dict[str, Any] = {
        **question.fields,
        "prompt": question.prompt,
        "image": [str(path) for path in question.images],
        "video": [str(path) for path in question.videos],
        "answer": answer.text,
        "visual_tokens": kept.visual_tokens,
        "kept": [{"layer": layer, "visual_tokens": count} for layer, count in kept.stages],
        "ids": config.ids,
        **took(answer),
    }
    if unpruned is not None:
        fields["unpruned"] = {"answer": unpruned.text, **took(unpruned)}
    return fields


def took(answer: Answer) -> dict[str, int | float | None]:
    """What an answer took, by name."""
    return {name: value for name, value in vars(answer).items() if name != "text"}


def in_words(answer: Answer) -> str:
    """What an answer took, in a line."""
    return (
        f"{answer.new_tokens} tokens behind a prompt of {answer.prompt_tokens}: first token in "
        f"{1000 * answer.first_token_s:.0f} ms, all in {1000 * answer.total_s:.0f} ms"
    )


def table_of(unpruned: Answer, pruned: Answer) -> Table:
    """What two answers to one prompt took, side by side."""
    table = Table("", "no pruning", "pruned")
    pair = (unpruned, pruned)
    table.add_row("first token, ms", *(f"{1000 * each.first_token_s:.0f}" for each in pair))
    table.add_row("next tokens, ms each", *(next_tokens(each) for each in pair))
    table.add_row("tokens written", *(str(each.new_tokens) for each in pair))
    table.add_row(
        "KV cache", *("" if each.kv_bytes is None else bytes_in_words(each.kv_bytes) for each in pair)
    )
    return table


def next_tokens(answer: Answer) -> str:
    """Milliseconds of a token behind the first one."""
    if answer.new_tokens < 2:
        return ""
    return f"{1000 * (answer.total_s - answer.first_token_s) / (answer.new_tokens - 1):.1f}"
