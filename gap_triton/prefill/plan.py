"""What each stage drops: how many rows before the first layer runs, and which rows may go once it is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..config import Stage
from ..state import Drop, Plan, Prompt, VisionSelection
from ..strategies.rows import positions_first


def decide(prompt: Prompt, stages: Sequence[Stage], selection: VisionSelection | None) -> tuple[Drop, ...]:
    """Return what each stage of a prefill drops; empty where no stage drops anything.

    Args:
        prompt: The prompt.
        stages: Where and how.
        selection: What the first stage keeps, where that is the one after the vision encoder; else None.
    """
    drops: list[Drop] = []
    before = prompt.visual_counts
    for stage in stages:
        counts = map(stage.count, prompt.visual_counts)
        keep = tuple(map(min, counts, before)) if selection is None else selection.keep
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
    return tuple(drops) if any(drop.keep != prompt.visual_counts for drop in drops) else ()


def plan_of(prompt: Prompt, drop: Drop, index: torch.Tensor | None) -> Plan:
    """Return what ``drop`` drops from the rows that it finds.

    Args:
        prompt: The prompt.
        drop: The stage.
        index: [B, S] int64, the rows of the prompt that are left, -1 = filler; None = all of them.
    """

    def at_rows(mask: torch.Tensor) -> torch.Tensor:
        return mask if index is None else mask.gather(1, index.clamp(min=0)) & (index >= 0)

    visual, real = at_rows(prompt.visual), at_rows(prompt.real)
    visual_index = prompt.visual_index if index is None else positions_first(visual, max(drop.visual_counts))
    stays = None
    if prompt.before_answer is not None:
        stays = at_rows(prompt.before_answer).gather(1, visual_index.clamp(min=0)) & (visual_index >= 0)
    return Plan(
        visual=visual,
        real=real,
        visual_index=visual_index,
        keep=torch.tensor(drop.keep, device=visual.device),
        stays=stays,
        rows=_scoring_rows(prompt, drop.text_rows, at_rows),
        padded=index is not None or any(count < prompt.visual.shape[1] for count in prompt.real_counts),
    )


def _scoring_rows(
    prompt: Prompt, text_rows: torch.Tensor | None, at_rows: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    query_rows = at_rows(prompt.query_rows)
    positions = torch.arange(query_rows.shape[1], device=query_rows.device)
    last_real = torch.where(query_rows, positions, 0).amax(dim=1, keepdim=True)  # [B, 1]
    most_text = max(prompt.text_counts)
    if text_rows is None or most_text == 0:
        return last_real
    rows = positions_first(at_rows(text_rows), most_text)  # [B, R]
    # A prompt that ends in its image has no text row after it; its last row ranks the tokens.
    rows[:, :1] = torch.where(rows[:, :1] < 0, last_real, rows[:, :1])
    return rows
