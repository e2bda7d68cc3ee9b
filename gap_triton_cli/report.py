"""What ``gap-triton run`` says of an answer: what was kept, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

import gap_triton
from gap_triton import GapConfig
from gap_triton.introspect import visual_token_ids
from gap_triton.latency.report import bytes_in_words

from .generate import Answer
from .questions import Question


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


def as_fields(question: Question, kept: Kept, answer: Answer, unpruned: Answer | None) -> dict[str, Any]:
    """What ``--json`` prints of one answer; times in seconds."""
    fields: dict[str, Any] = {
        **question.fields,
        "prompt": question.prompt,
        "image": [str(path) for path in question.images],
        "video": [str(path) for path in question.videos],
        "answer": answer.text,
        "visual_tokens": kept.visual_tokens,
        "kept": [{"layer": layer, "visual_tokens": count} for layer, count in kept.stages],
        "ids": kept.ids,
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
