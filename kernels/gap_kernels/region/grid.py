"""Regions of a raster grid, as the neighbours of each of its entries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..validation import check_grid, probe_of
from .op import MAX_NEIGHBOURS

CACHED_GRIDS = 256
"""Neighbours that stay in memory, the least recently used go first; 96 x 96 cells in 2 x 2 regions take 108 KiB."""


def grid_neighbours(
    grid: tuple[int, int],
    region: tuple[int, int] = (2, 2),
    device: torch.device | str | None = None,
) -> Tensor:
    """Return for each cell of a grid the other cells of its region, for `topk_per_region`.

    Cell ``j`` is at row ``j // W``, column ``j % W``. Regions tile the grid from its first row and column on. Where the
    grid isn't a multiple of them, those at the right and bottom edges are smaller, and their cells compete with fewer.

    Nüwa's code pads such a grid with cells of score 0 instead, which rank among the others but can't be kept: there a
    real cell whose score is negative, or 0, may lose its place to one of them; here it never does. For positive scores,
    such as sums of attention, the two agree.

    Args:
        grid: (H, W), rows and columns, any >= 1.
        region: (h, w), rows and columns of a region, >= 1, with h * w <= 9.
        device: Where the result is; default: where PyTorch creates tensors.

    Returns:
        [H * W, h * w - 1] int32: each cell's neighbours in raster order, -1 for those outside the grid. Kept for the
        next call with the same arguments, so not to be written to; made anew under ``torch.compile``,
        ``torch.export`` and CUDA graph capture.

    Raises:
        ValueError: If ``grid`` or ``region`` isn't a pair of ints in that range, the grid has more than 2**24 cells, or
            there is no such device.
    """
    check_grid("grid", grid)
    check_grid("region", region)
    if region[0] * region[1] > MAX_NEIGHBOURS + 1:
        raise ValueError(f"region: expected h * w <= {MAX_NEIGHBOURS + 1}, got {tuple(region)}")
    probe = probe_of(device)
    traced = torch.compiler.is_compiling() or type(probe) is not Tensor  # but a fake one
    if traced or (probe.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _neighbours(*grid, *region, probe.device)
    return _kept_neighbours(*grid, *region, probe.device)


@functools.lru_cache(CACHED_GRIDS)
def _kept_neighbours(height: int, width: int, rows: int, columns: int, device: torch.device) -> Tensor:
    # Copied from the CPU, for which the host waits: any stream may use the result then.
    with torch.inference_mode(False):
        return _neighbours(height, width, rows, columns, torch.device("cpu")).to(device)


def _neighbours(height: int, width: int, rows: int, columns: int, device: torch.device) -> Tensor:
    cell = torch.arange(height * width, dtype=torch.int32, device=device).unsqueeze(1)
    row, column = cell // width, cell % width
    place = row % rows * columns + column % columns  # in the region
    other = torch.arange(rows * columns - 1, dtype=torch.int32, device=device)
    other = other + (other >= place).int()  # all places but the cell's own
    row = row - row % rows + other // columns
    column = column - column % columns + other % columns
    return torch.where((row < height) & (column < width), row * width + column, -1).int()
