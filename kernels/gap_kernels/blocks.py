"""How work in plain PyTorch is divided, so that memory grows with the inputs and not with a product of their sizes."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_ELEMENTS = 1 << 22
"""Elements of the largest intermediate of a block, 16 MiB in float32: the next block gets the same memory."""


def row_blocks(num_rows: int, per_row: int) -> Iterator[slice]:
    """Divide rows into blocks of at most ``BLOCK_ELEMENTS`` elements, but of one row at least; no rows are one block.

    Args:
        num_rows: How many there are.
        per_row: Elements of the largest intermediate that one row takes.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, per_row))
    for start in range(0, max(1, num_rows), step):
        yield slice(start, start + step)
