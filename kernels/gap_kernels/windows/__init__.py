"""Ranks by which tokens from all parts of a grid come first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import ShapeChecker, check_grid, describe, describe_number, is_int
from .op import window_ranks_op

__all__ = ["WINDOWS", "window_ranks"]

WINDOWS = 4
"""Windows along each side: VScan's are of 6 x 6 on 24 x 24 tokens."""


def window_ranks(
    scores: Tensor, earlier: Tensor, grid: tuple[int, int], count: int, *, windows: int = WINDOWS
) -> Tensor:
    """Rank the tokens of a grid: first some by a score of their own, from all its parts, then the others by theirs.

    This is how VScan (arXiv 2505.22654, section 4.1, as released) chooses a half by the attention of an early layer of the
    vision encoder, and a half by that of the last. The grid is divided into ``windows`` x ``windows`` of as equal sizes as
    can be. Of each window the best by ``earlier`` enter, as few of each as it takes for ``count``, and of what enters the
    ``count`` best come first.

    Args:
        scores: [B, N] float32, one row per grid.
        earlier: [B, N] float32, what the first ones are chosen by.
        grid: (H, W), rows and columns, H * W = N; token j is at row ``j // W``, column ``j % W``.
        count: How many come first, >= 0; all, if there are fewer.
        windows: Windows along each side, >= 1; a side of fewer tokens has as many as it has tokens.

    Returns:
        [B, N] float32, infinity at what comes first. The others have their ``scores``, the largest finite number where these
        are infinity, and -infinity where they are NaN. Equal ones go to the lower token; in ``earlier`` NaN comes after all
        numbers. Where windows of a grid are too small for ``count`` to enter, the lowest others come first, too.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, or is out of range.
    """
    shapes = ShapeChecker()
    shapes.check("scores", scores, "B N", (torch.float32,))
    shapes.check("earlier", earlier, "B N", (torch.float32,))
    check_grid("grid", grid)
    if grid[0] * grid[1] != scores.shape[1]:
        raise ValueError(f"grid: expected H * W = {scores.shape[1]} (N of scores), got {describe(grid)}")
    if not is_int(count) or count < 0:
        raise ValueError(f"count: expected an int >= 0, got {describe(count)}")
    if not is_int(windows):
        raise ValueError(f"windows: expected an int >= 1, got {describe(windows)}")
    if windows < 1:
        raise ValueError(f"windows: expected an int >= 1, got {describe_number(windows)}")
    return window_ranks_op(scores, earlier, *grid, min(count, scores.shape[1]), min(windows, max(grid)))
