"""How work in plain PyTorch is divided, so that memory grows with the inputs and not with a product of their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

BLOCK_ELEMENTS = 1 << 22
"""Elements of the largest intermediate of a block, 16 MiB in float32: the next block gets the same memory."""
CACHED_SHARE = 4
"""What fits the caches of a CPU's core is that part of a block."""


def row_blocks(num_rows: int, per_row: int) -> Iterator[slice]:
    """Divide rows into blocks of at most ``BLOCK_ELEMENTS`` elements, but of one row at least; no rows are one block.

    Args:
        num_rows: How many there are.
        per_row: Elements of the largest intermediate that one row takes.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, per_row))
    for start in range(0, max(1, num_rows), step):
        yield slice(start, start + step)


def nested_blocks(sizes: Sequence[int], per_item: int) -> Iterator[tuple[slice, ...]]:
    """Divide the items of several dimensions into blocks that fit the caches of a CPU's core.

    The first dimension is divided first, and an inner one only where all of it is more than a block: the rows of a sample
    stay together, as a product of matrices with few rows reads the other matrix for each of them.

    Args:
        sizes: Of the dimensions, outer ones first.
        per_item: Elements of the largest intermediate that one item takes.

    Yields:
        For each dimension what part of it a block has. Blocks have at most ``BLOCK_ELEMENTS / CACHED_SHARE`` elements, but
        one item at least.
    """
    size, *inner = sizes
    inner_items = math.prod(inner)
    limit = BLOCK_ELEMENTS // CACHED_SHARE
    if inner and inner_items * per_item > limit:
        for start in range(size):
            for rest in nested_blocks(inner, per_item):
                yield (slice(start, start + 1), *rest)
        return
    step = max(1, limit // max(1, inner_items * per_item))
    for start in range(0, size, step):
        yield (slice(start, min(start + step, size)), *(slice(0, n) for n in inner))
