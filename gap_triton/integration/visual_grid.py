"""``visual_grid``: the caller gives the rows and columns of an image's visual tokens, where nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..plain import is_int, plain, shown

Grid = tuple[int, int]


def named_grids(given: Any) -> Grid | list[Grid]:
    """Return the grid of all images, or of one after the other, that ``given`` names.

    Args:
        given: ``[H, W]``, rows and columns of visual tokens, of every image (or frame of a video); or a list of those, one
            per image, in the order of the prompts of the batch. Lists, tuples or arrays of numpy.

    Raises:
        ValueError: ``given`` is something else.
    """
    if isinstance(given, torch.Tensor):
        raise ValueError(
            "visual_grid is a tensor, which generate() would repeat for each beam as if it had a row per sample: expected "
            "[H, W], or a list of one [H, W] per image; visual_grid.tolist() makes one"
        )
    one = _grid_of(given)
    if one is not None:
        return one
    several = [_grid_of(each) for each in _listed(given) or ()]
    grids = [grid for grid in several if grid is not None]
    if not grids or len(grids) < len(several):
        raise ValueError(
            f"visual_grid={shown(given)}: expected [H, W], two ints >= 1, rows and columns of visual tokens of every image, "
            "or a list of one [H, W] per image"
        )
    return grids


def _grid_of(given: Any) -> Grid | None:
    match [plain(size) for size in _listed(given) or ()]:
        case [height, width] if is_int(height) and is_int(width) and height >= 1 and width >= 1:
            return height, width
    return None


def _listed(given: Any) -> list[Any] | None:
    if isinstance(given, np.ndarray):
        return list(given) if given.ndim else None
    return list(given) if isinstance(given, (list, tuple)) else None
