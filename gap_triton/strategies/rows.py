"""Rows of tensors by index, where -1 is filler."""

from __future__ import annotations

import torch
from gap_kernels import topk_indices
from torch import Tensor


def members(index: Tensor, num_rows: int) -> Tensor:
    """Return which of ``num_rows`` rows are in an index.

    Args:
        index: [G, K] int64, -1 = filler.
        num_rows: N.

    Returns:
        [G, N] bool.
    """
    # One more column takes the filler.
    is_member = torch.zeros(index.shape[0], num_rows + 1, dtype=torch.bool, device=index.device)
    return is_member.scatter(1, index.where(index >= 0, num_rows), True)[:, :num_rows]


def gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Gather [G, N, C] at [G, K] int64 into [G, K, C]; filler, -1, gives rows of 0."""
    real = (index >= 0)[..., None]
    if not tensor.shape[1]:
        return tensor.new_zeros(*index.shape, tensor.shape[2])
    rows = tensor.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, tensor.shape[2]))
    return torch.where(real, rows, 0)


def rows_at(tensor: Tensor, index: Tensor) -> Tensor:
    """Gather [G, N, C] at [G, K] int64, which holds no filler, into [G, K, C]."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2]))


def best_of(scores: Tensor, candidates: Tensor, k: int | Tensor, length: int) -> Tensor:
    """Select the best-scored of some rows.

    Args:
        scores: [G, N] float32.
        candidates: [G, N] bool, the rows to choose from; at least ``k`` of them.
        k: Int, or [G] int64.
        length: Columns of the result.

    Returns:
        [G, length] int64, ascending, -1 on the left; ties go to the lower row, and NaN counts as -inf.
    """
    return topk_indices(last_where(~candidates, scores), k, length=length)


def last_where(mask: Tensor, scores: Tensor) -> Tensor:
    """Return scores that rank below all others where ``mask`` is True: NaN there, and -inf for what is NaN elsewhere."""
    return torch.where(mask, torch.nan, torch.where(scores.isnan(), -torch.inf, scores))


def nan_last(scores: Tensor) -> Tensor:
    """Return a copy of ``scores`` in which NaN is -inf."""
    return torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def best_last(scores: Tensor) -> Tensor:
    """Return a copy of ``scores`` in which nothing is as large as infinity, and NaN is -inf: what comes first gets that."""
    largest = torch.finfo(torch.float32).max
    return torch.nan_to_num(scores, nan=-torch.inf, posinf=largest, neginf=-torch.inf)


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """Return what sums over features are computed in: float64 for float64, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def positions_first(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Return the positions of the True entries of each row, ascending, then -1: [G, N] bool -> [G, width] int64."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    ordered = torch.where(mask, positions, mask.shape[1]).sort(dim=1).values[:, :width]
    return torch.where(ordered < mask.shape[1], ordered, -1)


def take_values(values: Tensor, index: Tensor) -> Tensor:
    """Gather [..., G, N] at [G, K] int64 into [..., G, K]; filler, -1, gives the value of row 0."""
    return values.gather(-1, index.clamp(min=0).expand(*values.shape[:-1], -1))
