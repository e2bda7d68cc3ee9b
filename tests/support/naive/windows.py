"""Ranks by windows, in loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ranks(
    scores: list[float], earlier: list[float], grid: tuple[int, int], count: int, windows: int
) -> Tensor:
    """Result [N] of one grid from the definition."""
    height, width = grid
    cells = range(height * width)
    of_cell = [(cell // width * windows // height, cell % width * windows // width) for cell in cells]
    enough = math.ceil(count / max(len(set(of_cell)), 1))
    ordered = sorted(cells, key=lambda cell: (math.isnan(earlier[cell]), -earlier[cell], cell))
    enters, taken = [], dict.fromkeys(of_cell, 0)
    for cell in ordered:
        taken[of_cell[cell]] += 1
        if taken[of_cell[cell]] <= enough:
            enters.append(cell)
    first = [*enters, *(cell for cell in cells if cell not in enters)][:count]
    largest = torch.finfo(torch.float32).max
    others = [-math.inf if math.isnan(score) else min(score, largest) for score in scores]
    return torch.tensor([math.inf if cell in first else others[cell] for cell in cells])
