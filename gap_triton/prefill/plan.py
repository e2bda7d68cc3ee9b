"""What each stage drops: how many rows before the first layer runs, and which rows may go once it is reached."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from gap_kernels import PromptRows, read_prompt

from ..config import Stage
from ..host import to_device
from ..state import Drop, Plan, Prefill, Prompt, Survivors, VisionSelection


def decide(
    prompt: Prompt, stages: Sequence[Stage], selection: VisionSelection | None, renumbers: bool = False
) -> tuple[Drop, ...]:
    """Return what each stage of a prefill drops; empty where no stage drops anything and no id changes.

    Args:
        prompt: The prompt.
        stages: Where and how.
        selection: What the first stage keeps, where that is the one after the vision encoder; else None.
        renumbers: Whether survivors get other ids, also where nothing is dropped.
    """
    drops: list[Drop] = []
    before = prompt.visual_counts
    for stage in stages:
        keep = tuple(map(stage.count, prompt.visual_counts, before)) if selection is None else selection.keep
        lengths, dense, after = [], True, []
        for b, kept in enumerate(keep):
            # The last row of the prompt always stays, because generation reads its logits, and so does the last of the
            # forward: one more row where it is a visual token that was not chosen, or where it is padding.
            visual_stays = prompt.ends_in_image[b] and kept < before[b]
            extra = int(visual_stays) + int(not prompt.last_is_real[b])
            lengths.append(prompt.real_counts[b] - prompt.visual_counts[b] + kept + extra)
            dense = dense and not extra
            after.append(kept + int(visual_stays))
        dense = dense and min(lengths) == max(lengths)
        drops.append(Drop(stage, keep, before, max(lengths), dense, selection))
        before, selection = tuple(after), None  # what was selected before the decoder is the first stage's
    changes = renumbers or any(drop.keep != prompt.visual_counts for drop in drops)
    return tuple(drops) if changes else ()


def keeps_of(drops: Sequence[Drop], device: torch.device) -> torch.Tensor | None:
    """Return how many tokens each stage keeps, [stages, B] int64, in one copy; None where samples keep equally many."""
    if all(len(set(drop.keep)) == 1 for drop in drops):
        return None
    return to_device([drop.keep for drop in drops], device)


def plan_of(prefill: Prefill, drop: Drop, earlier: Survivors | None) -> Plan:
    """Return what ``drop`` drops from the rows that it finds.

    Args:
        prefill: The prompt.
        drop: The stage.
        earlier: What the stage before left of the prompt; None = all of it.
    """
    prompt = prefill.prompt
    rows, visual_index, text_rows = _rows_left(prompt, drop, earlier)
    stays = None
    if prompt.before_answer is not None:
        stays = prompt.before_answer
        if earlier is not None:
            index = earlier.index.to(stays.device)
            stays = stays.gather(1, index.clamp(min=0)) & (index >= 0)
        stays = stays.gather(1, visual_index.clamp(min=0)) & (visual_index >= 0)
    keep = drop.keep[0] if prefill.keeps is None else prefill.keeps[prefill.done]
    return Plan(
        visual=rows.visual,
        real=rows.real,
        visual_index=visual_index,
        keep=keep,
        stays=stays,
        rows=rows.last_row if drop.rankers is None else text_rows,
        # A later stage may find the visual token at the end of a prompt among those that were chosen, or beside them.
        filled=len(set(drop.visual_counts)) == 1 and not (earlier and any(prompt.ends_in_image)),
        padded=prompt.padded if earlier is None else not earlier.dense,
    )


def _rows_left(
    prompt: Prompt, drop: Drop, earlier: Survivors | None
) -> tuple[PromptRows, torch.Tensor, torch.Tensor]:
    """The rows that ``drop`` finds, the visual ones among them [B, V], and those that rank [B, R]."""
    if earlier is None and (drop.rankers is None or drop.rankers is prompt.text_after):
        return prompt.rows, prompt.visual_index, prompt.text_rows
    # Where no image token after the first image is left, all text behind that follows the last visual token.
    text_counts: Iterable[int] = prompt.text_counts
    if drop.rankers is None:
        text_counts = map(operator.sub, prompt.real_counts, prompt.visual_counts)
    rows = read_prompt(
        prompt.visual,
        attention_mask=prompt.real if prompt.padded else None,
        answer=prompt.answer,
        rankers=drop.rankers,
        index=None if earlier is None else earlier.index.to(prompt.visual.device),
        num_visual=max(drop.visual_counts),
        num_text=max(1, *text_counts),
    )
    return rows, rows.visual_index, rows.text_rows
