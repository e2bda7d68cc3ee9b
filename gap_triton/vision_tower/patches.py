"""From the patches of a vision tower to visual tokens: which patches become one, and in which order the tower has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_of_patches(rows: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Return the mean over ``dim``, in which the patches of one visual token lie, in the dtype of ``rows``."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.mean(dim=dim, dtype=dtype).to(rows.dtype)


def out_of_windows(grids: Sequence[Sequence[int]], merge: int, window: int) -> Tensor:
    """Return where each visual token is in a tower that takes each frame window by window.

    Args:
        grids: Frames, rows and columns of patches of each image or video.
        merge: Side of the square of patches that become one token.
        window: Side of a window in tokens.

    Returns:
        [F] int64: by feature in raster order, its row in the tower.
    """
    orders, start = [], 0
    for frames, height, width in grids:
        row, column = torch.meshgrid(
            torch.arange(height // merge), torch.arange(width // merge), indexing="ij"
        )
        # A stable sort keeps raster order inside a window.
        in_windows = ((row // window) * width + column // window).flatten().argsort(stable=True)
        for _ in range(frames):
            orders.append(in_windows.argsort() + start)
            start += len(in_windows)
    return torch.cat(orders)
