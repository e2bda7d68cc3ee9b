"""Reading a prompt: which rows are visual, which are padding, and which text ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..validation import ShapeChecker, check_length, describe, is_int
from .op import COUNTS, read_prompt_op

__all__ = ["PromptRows", "read_prompt"]

MOST_PLACEHOLDERS = 4
MASK_DTYPES = (
    torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float32, torch.float16,
    torch.bfloat16, torch.float64,
)  # fmt: skip


class PromptRows(NamedTuple):
    """The rows of a prompt, S of them: all Q, or those that are left."""

    visual: Tensor
    """[B, S] bool, the visual tokens."""
    real: Tensor
    """[B, S] bool, False at padding and filler."""
    text: Tensor
    """[B, S] bool, the rows that rank: the text of the prompt behind its last visual token, or ``rankers``."""
    visual_index: Tensor
    """int64 [B, V], the visual rows, ascending, then -1."""
    text_rows: Tensor
    """int64 [B, R], the rows that rank, ascending, then -1; where there are none, ``last_row`` in their place."""
    last_row: Tensor
    """int64 [B, 1], the last row of the prompt that is neither padding nor answer; 0 where there is none."""
    counts: Tensor
    """int64 [5, B]: how many rows are visual, are real, and rank; whether the prompt ends in a visual token; whether the
    last of the S rows is real."""


def read_prompt(
    tokens: Tensor,
    placeholders: Sequence[int] = (),
    *,
    attention_mask: Tensor | None = None,
    answer: Tensor | None = None,
    rankers: Tensor | None = None,
    index: Tensor | None = None,
    num_visual: int | None = None,
    num_text: int | None = None,
    counts: Sequence[Sequence[int]] | None = None,
) -> PromptRows:
    """Find the visual tokens of a prompt, its padding, and the text rows that rank the visual tokens, in one launch.

    Args:
        tokens: [B, Q] int64 token ids, of which ``placeholders`` are visual; or bool, True at visual tokens.
        placeholders: At most four ids, >= 0.
        attention_mask: [B, Q], bool, integers or floats, 0 at padding; None = no padding.
        answer: [B, Q] bool, rows behind the prompt: they rank nothing, and the prompt ends before the first.
        rankers: [B, Q] bool, rows that rank in place of the text behind the last visual token.
        index: [B, S] int64, rows that are left, -1 = filler; None = all. Results count within these.
        num_visual: V. Default S. More than a sample has means filler.
        num_text: R >= 1. Default S.
        counts: What is known of the result's ``counts``, five rows of B ints; on the CPU they are compared.

    Returns:
        The rows.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, or is out of range. On the CPU also if
            V or R is less than a sample has, ``index`` names a row that isn't there, or ``counts`` are others.
    """
    shapes = ShapeChecker()
    shapes.check("tokens", tokens, "B Q", (torch.int64, torch.bool))
    if tokens.shape[1] == 0:
        raise ValueError(f"tokens: expected at least one row, got {describe(tokens)}")
    ids = list(placeholders) if isinstance(placeholders, (list, tuple)) else [-1]
    if len(ids) > MOST_PLACEHOLDERS or not all(is_int(each) and 0 <= each < 1 << 63 for each in ids):
        raise ValueError(
            f"placeholders: expected at most {MOST_PLACEHOLDERS} ids >= 0, got {describe(placeholders)}"
        )
    if attention_mask is not None:
        shapes.check("attention_mask", attention_mask, "B Q", MASK_DTYPES)
    for name, mask in (("answer", answer), ("rankers", rankers)):
        if mask is not None:
            shapes.check(name, mask, "B Q", (torch.bool,))
    if index is not None:
        shapes.check("index", index, "B S", (torch.int64,))
        if index.shape[1] == 0:
            raise ValueError(f"index: expected at least one row, got {describe(index)}")
    num_rows = tokens.shape[1] if index is None else index.shape[1]
    num_visual = num_rows if num_visual is None else num_visual
    num_text = num_rows if num_text is None else num_text
    check_length(num_visual, at_least=0, name="num_visual")
    check_length(num_text, at_least=1, name="num_text")
    expected = None if counts is None else _listed(counts, tokens.shape[0])
    return PromptRows(
        *read_prompt_op(tokens, ids, attention_mask, answer, rankers, index, num_visual, num_text, expected)
    )


def _listed(counts: Sequence[Sequence[int]], batch: int) -> list[int]:
    """``counts`` as one list."""
    rows = list(counts) if isinstance(counts, (list, tuple)) else []
    if len(rows) != len(COUNTS) or not all(
        isinstance(row, (list, tuple)) and len(row) == batch and all(map(is_int, row)) for row in rows
    ):
        raise ValueError(f"counts: expected {len(COUNTS)} rows of {batch} ints, got {describe(counts)}")
    return [each for row in rows for each in row]
