"""Which visual tokens are kept, given scores of two layers of the vision encoder: some by the earlier one."""

from __future__ import annotations

import numpy as np
import torch
from gap_kernels import topk_indices, window_ranks
from torch import Tensor

from ..constants import Constants
from ..host import to_device
from .rows import best_last

BY_TWO_LAYERS = ("anchors", "windows")

ANCHORS_OF = 50
"""HiPrune takes one anchor for so many tokens kept: with its neighbours that is a tenth, `HIPRUNE_ALPHA` of its code."""
LOCAL_OF = 2
"""VScan takes one in so many of the tokens kept by windows."""

_TABLES = Constants(64)


def with_neighbours(scores: Tensor, earlier: Tensor, keep: int, grid: tuple[int, int]) -> Tensor:
    """Rank anchors by an earlier layer, with their neighbours, before the best of the rest (HiPrune, arXiv 2508.00553).

    Args:
        scores: [G, N] float32; NaN counts as -inf.
        earlier: [G, N] float32, the score in an earlier layer.
        keep: How many are chosen, 0..N; one anchor for each 50 of them, rounded, with its up to 4 neighbours.
        grid: (H, W), H * W = N.

    Returns:
        [G, N] float32, as `best_last`: what is first has infinity, so that the ``keep`` largest are chosen.
    """
    anchors = topk_indices(earlier, round(keep / ANCHORS_OF))
    device = scores.device
    near = _TABLES.get((grid, device), device, lambda: to_device(torch.from_numpy(_cross(*grid)), device))
    return best_last(scores).scatter_(1, near[anchors].flatten(1), torch.inf)


def by_windows(scores: Tensor, earlier: Tensor, keep: int, grid: tuple[int, int]) -> Tensor:
    """Rank a half by an earlier layer, from all parts of the image, before the best of the rest (VScan, arXiv 2505.22654).

    The half, rounded down, is the best of what is among the best of its window, of 4 x 4: as few of each as suffice.

    Args:
        scores: [G, N] float32; NaN counts as -inf.
        earlier: [G, N] float32, the score in an earlier layer.
        keep: How many are chosen, 0..N.
        grid: (H, W), H * W = N.

    Returns:
        [G, N] float32, as `best_last`: what is first has infinity, so that the ``keep`` largest are chosen.
    """
    return window_ranks(scores, earlier, grid, keep // LOCAL_OF)


def _cross(height: int, width: int) -> np.ndarray:
    """[H * W, 5] int64, each cell, and the cells beside, above and below it; itself again where there is none."""
    number = np.arange(height * width)
    row, column = number // width, number % width
    columns = [number]
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        there = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        columns.append(np.where(there, number + down * width + right, number))
    return np.stack(columns, axis=1)
