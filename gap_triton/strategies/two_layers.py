"""Which visual tokens are kept, given scores of two layers of the vision encoder: some by the earlier one."""

from __future__ import annotations

import torch
from gap_kernels import topk_indices
from torch import Tensor

from .rows import last_where, members

BY_TWO_LAYERS = ("anchors", "windows")

ANCHORS_OF = 50
"""HiPrune takes one anchor for so many tokens kept: with its neighbours that is a tenth, `HIPRUNE_ALPHA` of its code."""
LOCAL_OF = 2
"""VScan takes one in so many of the tokens kept by windows."""
WINDOWS = 4
"""Windows along each side: VScan's are of 6 x 6 on 24 x 24 tokens."""


def with_neighbours(scores: Tensor, earlier: Tensor, keep: int, grid: tuple[int, int]) -> Tensor:
    """Choose anchors by an earlier layer, their neighbours, and the best of the rest (HiPrune, arXiv 2508.00553).

    Args:
        scores: [G, N] float32; NaN counts as -inf.
        earlier: [G, N] float32, the score in an earlier layer.
        keep: How many to choose, 0..N; one anchor for each 50 of them, rounded, with its up to 4 neighbours.
        grid: (H, W), H * W = N.

    Returns:
        [G, keep] int64, ascending.
    """
    anchors = topk_indices(earlier, round(keep / ANCHORS_OF))
    marks = members(anchors, scores.shape[1]).unflatten(1, grid)
    near = marks.clone()
    near[:, 1:] |= marks[:, :-1]
    near[:, :-1] |= marks[:, 1:]
    near[:, :, 1:] |= marks[:, :, :-1]
    near[:, :, :-1] |= marks[:, :, 1:]
    return first_then_best(scores, near.flatten(1), keep)


def by_windows(scores: Tensor, earlier: Tensor, keep: int, grid: tuple[int, int]) -> Tensor:
    """Choose a half by an earlier layer, from all parts of the image, and the best of the rest (VScan, arXiv 2505.22654).

    The half, rounded down, is the best of what is among the best of its window, of 4 x 4: as few of each as suffice.

    Args:
        scores: [G, N] float32; NaN counts as -inf.
        earlier: [G, N] float32, the score in an earlier layer.
        keep: How many to choose, 0..N.
        grid: (H, W), H * W = N.

    Returns:
        [G, keep] int64, ascending.
    """
    local = keep // LOCAL_OF
    number = torch.arange(scores.shape[1], device=scores.device)
    row, column = number // grid[1] * WINDOWS // grid[0], number % grid[1] * WINDOWS // grid[1]
    in_window = (row * WINDOWS + column)[:, None] == torch.arange(
        WINDOWS**2, device=scores.device
    )  # [N, windows]
    windows = min(WINDOWS, grid[0]) * min(WINDOWS, grid[1])
    order = (0.0 - earlier).argsort(dim=1, stable=True)  # NaN last
    rank = in_window[order].long().cumsum(1)  # how many of each window are as good, or better
    enough = (rank <= -(-local // windows)) & in_window[order]
    candidates = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, enough.any(2))
    best = topk_indices(last_where(~candidates, earlier), local)
    return first_then_best(scores, members(best, scores.shape[1]), keep)


def first_then_best(scores: Tensor, first: Tensor, keep: int) -> Tensor:
    """Choose what is ``first`` [G, N] bool, and fill up ``keep`` with the best of the others, by ``scores`` [G, N] float32.

    Returns:
        [G, keep] int64, ascending; NaN counts as -inf.
    """
    # No score is above the largest number but its infinity.
    scores = torch.nan_to_num(
        scores, nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf
    )
    return topk_indices(scores.masked_fill_(first, torch.inf), keep)
