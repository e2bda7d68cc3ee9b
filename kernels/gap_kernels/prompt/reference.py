"""Reading a prompt in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def read_prompt(
    tokens: Tensor,
    placeholders: Sequence[int],
    attention_mask: Tensor | None,
    answer: Tensor | None,
    rankers: Tensor | None,
    index: Tensor | None,
    num_visual: int,
    num_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find the visual and the ranking rows of each sample, see `gap_kernels.read_prompt`.

    Args:
        tokens: [B, Q] int64 token ids; or bool, True at visual tokens.
        placeholders: Ids of visual tokens, for int64 ``tokens``.
        attention_mask: [B, Q] of any dtype, nonzero at real tokens; or None.
        answer: [B, Q] bool or None.
        rankers: [B, Q] bool or None.
        index: [B, S] int64, the rows that are left, -1 = filler; or None, with S = Q.
        num_visual: V.
        num_text: R.

    Returns:
        The fields of `gap_kernels.PromptRows`.
    """

    def at_rows(mask: Tensor) -> Tensor:
        return mask if index is None else mask.gather(1, index.clamp(min=0)) & (index >= 0)

    every = torch.ones_like(tokens, dtype=torch.bool)
    real = at_rows(every if attention_mask is None else attention_mask != 0)
    named = tokens if tokens.dtype == torch.bool else torch.isin(tokens, tokens.new_tensor(placeholders))
    visual = at_rows(named) & real
    is_answer = torch.zeros_like(real) if answer is None else at_rows(answer)
    query_rows = real & ~is_answer
    row = torch.arange(real.shape[1], device=tokens.device)
    last_visual = torch.where(visual, row, -1).amax(dim=1, keepdim=True)
    text = query_rows & ~visual & (row > last_visual) if rankers is None else at_rows(rankers) & real
    last_row = torch.where(query_rows, row, 0).amax(dim=1, keepdim=True)
    before_answer = visual & F.pad(is_answer[:, 1:], (0, 1))
    text_rows = _rows_first(text, num_text)
    text_rows[:, :1] = torch.where(text.any(dim=1, keepdim=True), text_rows[:, :1], last_row)
    counts = [
        visual.sum(dim=1),
        real.sum(dim=1),
        text.sum(dim=1),
        visual[:, -1] | before_answer.any(dim=1),
        real[:, -1],
    ]
    return (
        visual, real, text, _rows_first(visual, num_visual), text_rows, last_row,
        torch.stack([each.long() for each in counts]),
    )  # fmt: skip


def _rows_first(mask: Tensor, width: int) -> Tensor:
    """Return the True entries of each row of ``mask`` [B, S], ascending, then -1: [B, width] int64."""
    row = torch.arange(mask.shape[1], device=mask.device)
    ordered = torch.where(mask, row, mask.shape[1]).sort(dim=1).values[:, :width]
    ordered = torch.where(ordered < mask.shape[1], ordered, -1)
    return F.pad(ordered, (0, width - ordered.shape[1]), value=-1)
