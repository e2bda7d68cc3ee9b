"""``gap_kernels::read_prompt``: registration, fake kernel and value checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, operator
from ..validation import check_range
from . import reference

COUNTS = (
    "visual tokens",
    "real tokens",
    "text rows that rank",
    "image at the end (1 = yes)",
    "real last row (1 = yes)",
)


@operator("read_prompt")
def read_prompt_op(
    tokens: Tensor,
    placeholders: Sequence[int],
    attention_mask: Tensor | None,
    answer: Tensor | None,
    rankers: Tensor | None,
    index: Tensor | None,
    num_visual: int,
    num_text: int,
    expected: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Read the prompt; see ``reference.py``. ``expected``: the counts [5, B] in one list, compared on the CPU."""
    if index is not None and index.is_cpu:
        check_range("index", index, -1, tokens.shape[1] - 1)
    given = (tokens, placeholders, attention_mask, answer, rankers, index, num_visual, num_text)
    if use_triton(tokens):
        from . import kernel

        rows = kernel.read_prompt(*given)
    else:
        rows = reference.read_prompt(*given)
    if tokens.is_cpu:
        _check_counts(rows[-1], num_visual, num_text, expected)
    return rows


@fake("read_prompt")
def _(
    tokens: Tensor, index: Tensor | None, num_visual: int, num_text: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_rows = tokens.shape if index is None else index.shape
    visual, real, text = (tokens.new_empty((batch, num_rows), dtype=torch.bool) for _ in range(3))

    def new(*shape: int) -> Tensor:
        return tokens.new_empty(shape, dtype=torch.int64)

    return visual, real, text, new(batch, num_visual), new(batch, num_text), new(batch, 1), new(5, batch)


def _check_counts(counts: Tensor, num_visual: int, num_text: int, expected: Sequence[int] | None) -> None:
    found = counts.tolist()
    for name, width, needed in (("num_visual", num_visual, found[0]), ("num_text", num_text, found[2])):
        if width < max(needed, default=0):
            raise ValueError(f"{name}: expected at least {max(needed)}, the most in a sample, got {width}")
    if expected is None:
        return
    batch = counts.shape[1]
    for number, (name, row) in enumerate(zip(COUNTS, found, strict=True)):
        wanted = list(expected[number * batch : (number + 1) * batch])
        if wanted != row:
            raise ValueError(f"counts: expected {row} for the number of {name}, by sample, got {wanted}")
