"""Which tokens of one image survive."""

from __future__ import annotations

import torch
from torch import Tensor

from ..strategies import spatial_order
from ..strategies.coverage import choose_on_grid
from ..strategies.draw import draw
from .plan import Plan


def choose(
    plan: Plan, grid: tuple[int, int], score: Tensor | None = None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Return the survivors of an image.

    Args:
        plan: How they are chosen.
        grid: (H, W), its rows and columns of tokens.
        score: [H * W] float32, what the vision tower says of them; None before it ran, or where it isn't asked.
        device: Where the result is, if the tower isn't asked.

    Returns:
        [kept] int64, ascending; None where all survive, or where nothing is known before the tower ran.
    """
    if plan.kept >= grid[0] * grid[1]:
        return None
    if plan.is_known:
        score = _score_of(plan, grid)
        # Both the ids of a prompt and its features are chosen by it: on one device, so that they agree.
        return choose_on_grid(score[None], plan.kept, plan.coverage, grid)[0].to(device)
    return None if score is None else choose_on_grid(score[None], plan.kept, plan.coverage, grid)[0]


def _score_of(plan: Plan, grid: tuple[int, int]) -> Tensor:
    if plan.score == "random":
        return draw(plan.seed, 0, grid[0] * grid[1])
    return -spatial_order(grid, device="cpu").float()
