"""Ranks by windows in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

from ..select.reference import best_first


def window_ranks(
    scores: Tensor, earlier: Tensor, height: int, width: int, count: int, windows: int
) -> Tensor:
    """Rank the tokens of grids, see `gap_kernels.window_ranks`.

    Args:
        scores: [B, N] float32.
        earlier: [B, N] float32.
        height: Rows of the grid.
        width: Its columns; N = height * width.
        count: How many come first, 0..N.
        windows: Windows along each side, >= 1.

    Returns:
        [B, N] float32.
    """
    num_tokens = scores.shape[1]
    number = torch.arange(num_tokens, device=scores.device)
    window = number // width * windows // height * windows + number % width * windows // width
    order = best_first(earlier)
    # Of each token in that order; window by window, the best first.
    place = window[order].argsort(dim=1, stable=True)
    token = order.gather(1, place)
    by_window = window.sort().values
    rank = number - torch.searchsorted(by_window, by_window)
    # What does not enter follows, by its row.
    following = torch.where(rank < enough(height, width, count, windows), place, token + num_tokens)
    first = token.gather(1, following.argsort(dim=1)[:, :count])
    largest = torch.finfo(torch.float32).max
    others = torch.nan_to_num(scores, nan=-torch.inf, posinf=largest, neginf=-torch.inf)
    return others.scatter_(1, first, torch.inf)


def enough(height: int, width: int, count: int, windows: int) -> int:
    """Return how many of each window it takes for ``count``."""
    number = min(height, windows) * min(width, windows)
    return -(-count // number)
