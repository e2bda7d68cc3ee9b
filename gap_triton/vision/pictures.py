"""One image or video as a prompt has it, and what of a vision tower its tokens are, where a model cuts it into tiles.

A model's own packing runs on numbers in the place of features: so its rules need not be known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NEWLINE = -1.0
INTERPOLATED = (
    "an image is larger than the model takes, so that it interpolates between the vision tower's features, and its visual "
    "tokens are not those of the tower"
)


@dataclass(frozen=True)
class Grid:
    """A grid among the tokens of one image: its size, and by cell the number of its token in the image and its feature."""

    size: tuple[int, int]
    index: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Picture:
    """One image or video: how many tokens of the prompt it takes, and the grids among them."""

    tokens: int
    grids: tuple[Grid, ...]


def numbered(tiles: int, side: int) -> Tensor:
    """Return stand-ins for the features of ``tiles`` of side * side tokens, [tiles, side * side, 2] float64: their numbers.

    Beside each number its square: an average of several numbers is not one of them, even where it is an integer.
    """
    numbers = torch.arange(tiles * side * side, dtype=torch.float64).unflatten(0, (tiles, side * side))
    return torch.stack([numbers, numbers.square()], dim=-1)


def numbered_newline() -> Tensor:
    """Return the newline, [2] float64, that goes with `numbered`."""
    return torch.tensor([NEWLINE, NEWLINE**2], dtype=torch.float64)


def picture_of(packed: Tensor, side: int) -> Picture | None:
    """Return an image, from what a model packs of `numbered` tiles, [N, 2] float64: overview, then rows with a newline each.

    None where the model has interpolated between features, so that its tokens are none of them.
    """
    numbers, squares = packed.T.numpy()
    if not np.array_equal(np.square(numbers), squares):
        return None
    features = numbers.round().astype(np.int64)
    grids = [Grid((side, side), np.arange(side * side), features[: side * side])]
    details = features[side * side :]
    newlines, index = np.flatnonzero(details == NEWLINE), np.flatnonzero(details != NEWLINE)
    if len(index):
        grids.append(Grid((len(newlines), len(index) // len(newlines)), index + side * side, details[index]))
    return Picture(len(features), tuple(grids))
