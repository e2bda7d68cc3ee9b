"""Where the columns of later layers stand in the mask that a model makes of a decode step: the same in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of the layers behind S stages, in N places. What follows the prompt has the same places in all of them.

    Attributes:
        positions: [B, 1, S, N] int64, the original position of each column; any position where no row may attend to it.
        real: [B, 1, S, N] bool, False at columns that no row may attend to; None = there are none.
        starts: By stage, the place of its first column. Those that hold more of the prompt begin further left.
        stops: By stage, the place after the last column of a static cache; None for a cache that grows.
        width: Number of columns of the model's own mask for a static cache; None for a cache that grows.
    """

    positions: torch.Tensor
    real: torch.Tensor | None
    starts: tuple[int, ...]
    stops: tuple[int, ...] | None = None
    width: int | None = None


def growing_columns(indices: Sequence[torch.Tensor], covered: int, dense: bool, following: int) -> Columns:
    """Return the columns of a cache that grows, with room for ``following`` tokens behind the prompt.

    Args:
        indices: By stage, [B, n] int64, the original position of each column that is left of the prompt; -1 = none.
        covered: Number of original positions of the prompt, and of what was before it.
        dense: No -1 in ``indices``.
        following: Number of tokens.
    """
    positions, starts = _side_by_side(indices, covered, following)
    if dense:
        return Columns(positions, None, starts)
    return Columns(positions.clamp(min=0), positions >= 0, starts)


def fixed_columns(
    indices: Sequence[torch.Tensor], covered: int, dense: bool, lengths: Sequence[int], width: int
) -> Columns:
    """Return the columns of a cache whose layers don't grow; see `growing_columns`.

    Args:
        indices: By stage, [B, n] int64.
        covered: Number of original positions of the prompt, and of what was before it.
        dense: No -1 in ``indices``.
        lengths: By stage, the number of columns of its layers.
        width: The number of columns of the model's own mask.
    """
    following = max(length - index.shape[1] for length, index in zip(lengths, indices, strict=True))
    positions, starts = _side_by_side(indices, covered, following)
    stops = tuple(start + length for start, length in zip(starts, lengths, strict=True))
    if dense and covered + following <= width:
        return Columns(positions, None, starts, stops, width)
    # Layers that are as long as the first one have columns behind what they will ever hold.
    real = (positions >= 0) & (positions < width)
    return Columns(positions.clamp(min=0, max=width - 1), real, starts, stops, width)


def _side_by_side(
    indices: Sequence[torch.Tensor], covered: int, following: int
) -> tuple[torch.Tensor, tuple[int, ...]]:
    device, batch = indices[0].device, indices[0].shape[0]
    longest = max(index.shape[1] for index in indices)
    starts = tuple(longest - index.shape[1] for index in indices)
    new = torch.arange(covered, covered + following, device=device).expand(batch, -1)
    rows = [
        torch.cat(
            [*([index.new_zeros(batch, start)] if start else ()), index, new.to(index.device)], dim=1
        ).to(device)
        for index, start in zip(indices, starts, strict=True)
    ]
    stages = rows[0][:, None] if len(rows) == 1 else torch.stack(rows, dim=1)
    return stages[:, None], starts
