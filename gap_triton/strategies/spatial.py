"""A fixed order of the cells of a grid whose beginnings are spread evenly over it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from gap_kernels.validation import check_grid, probe_of
from torch import Tensor

CACHED_GRIDS = 256
"""Ranks that stay in memory, the least recently used go first; those of 96 x 96 cells take 72 KiB."""


def spatial_order(grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Rank the cells of a grid such that the first k are spread evenly over it, for every k.

    The ranks are those of ordered dithering: each cell's threshold in the Bayer matrix of the next power of two,
    counted among the cells of the grid. For every k, any two blocks of 2^b x 2^b cells that start at multiples of
    2^b hold equally many of the first k cells, give or take one. A quarter of the cells of a grid of 2^b x 2^b is
    exactly the lattice of stride 2. This is the uniform stride of GAP's "spatial" baseline (arXiv 2506.21873), for any
    count.

    Args:
        grid: (H, W), rows and columns, both at least 1.
        device: Where the result is; default: where PyTorch creates tensors.

    Returns:
        [H*W] int64, a permutation of 0..H*W-1: the rank of the cell at row ``j // W``, column ``j % W``. Kept for the
        next call with the same arguments, so not to be written to; made anew under ``torch.compile``,
        ``torch.export`` and CUDA graph capture.

    Raises:
        ValueError: If ``grid`` isn't two ints of at least 1, has more than 2**24 cells, or there is no such device.
    """
    check_grid("grid", grid)
    probe = probe_of(device)  # no plain tensor while fake ones are traced
    capturing = probe.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or type(probe) is not Tensor or capturing:
        return _ranks(*grid, probe.device)
    return _kept_ranks(*grid, probe.device)


def spatial_order_on_host(grid: tuple[int, int]) -> np.ndarray:
    """Rank the cells of a grid as `spatial_order` does, without PyTorch: [H*W] int64, not to be written to."""
    check_grid("grid", grid)
    return _ranks_on_host(*grid)


@lru_cache(CACHED_GRIDS)
def _ranks_on_host(height: int, width: int) -> np.ndarray:
    return (
        _thresholds(np.arange(height)[:, None], np.arange(width), (height, width)).ravel().argsort().argsort()
    )


@lru_cache(CACHED_GRIDS)
def _kept_ranks(height: int, width: int, device: torch.device) -> Tensor:
    # Copied from the CPU, for which the host waits: any stream may use the result then.
    with torch.inference_mode(False):
        return torch.from_numpy(_ranks_on_host(height, width)).clone().to(device)


def _ranks(height: int, width: int, device: torch.device) -> Tensor:
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    # A permutation sorted is its inverse: the rank of each cell.
    return _thresholds(row, column, (height, width)).flatten().argsort().argsort()


def _thresholds(row: Any, column: Any, grid: tuple[int, int]) -> Any:
    """[H, W], the Bayer matrix, from the row [H, 1] and the column [W] of the cells, as arrays or tensors."""
    threshold = row * 0 + column * 0
    # The last bit of the coordinates is the first digit of the threshold: neighbours differ the most.
    for bit in range((max(grid) - 1).bit_length()):
        down, right = row >> bit & 1, column >> bit & 1
        # 0 and 1 for the corners on the diagonal of a block, 2 and 3 for the others.
        threshold = 4 * threshold + 2 * (down ^ right) + down
    return threshold
