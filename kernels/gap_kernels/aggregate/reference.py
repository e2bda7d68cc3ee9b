"""Spatial aggregation in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import nested_blocks

NORM_EPSILON = 1e-12
"""The least norm that a similarity vector is divided by."""
SUM_EPSILON = 1e-8
"""Added to the sum that an anchor's weights are divided by."""


def spatial_aggregate(
    features: Tensor,
    similarity_features: Tensor,
    anchors: Tensor,
    width: int,
    radius: float,
    pillars: Tensor | None,
    self_weight: float | None,
    scores: Tensor | None = None,
    share: int = 0,
    of_shares: int = 1,
) -> Tensor:
    """Compute `gap_kernels.spatial_aggregate`; float64 inputs make it the oracle of the other paths.

    Args:
        features: [B, N, C].
        similarity_features: [B, N, E].
        anchors: [B, M] int64, -1 = filler.
        width: Columns of the grid; N is a multiple of it.
        radius: In patches.
        pillars: [B, M] bool or None.
        self_weight: None = what the division gives.
        scores: [B, N] float32, by which pillars are found; or None.
        share: Of the quantile of the anchors' scores from which on they are pillars, the numerator.
        of_shares: Its denominator.

    Returns:
        [B, M, C] in the dtype of ``features``.
    """
    exact = torch.float64 in (features.dtype, similarity_features.dtype)
    dtype = torch.float64 if exact else torch.float32
    values = features.to(dtype)
    if scores is not None:
        pillars = are_pillars(scores, anchors, share, of_shares)
    unit = F.normalize(similarity_features.to(dtype), dim=-1, eps=NORM_EPSILON)
    batch, num_patches, _ = features.shape
    down = torch.arange(num_patches // width, device=features.device)
    right = torch.arange(width, device=features.device)
    output = features.new_empty((*anchors.shape, features.shape[2]))
    for samples, block in nested_blocks((batch, anchors.shape[1]), num_patches):
        anchor = anchors[samples, block].clamp(min=0)[:, :, None]  # [b, m, 1]
        cosine = _rows(unit[samples], anchor) @ unit[samples].transpose(-1, -2)  # [b, m, N]
        # Squares of whole rows and columns of the grid, so that only their sums are as many as weights.
        down_squared = (down - anchor // width).square()[..., None]  # [b, m, H, 1]
        right_squared = (right - anchor % width).square()[:, :, None]  # [b, m, 1, W]
        distance = (down_squared + right_squared).flatten(2).to(dtype).sqrt_()
        # Filled, not multiplied by 0: the similarity of what is too far away may be NaN.
        far = distance >= radius
        weight = cosine.relu_().mul_(distance.div_(-radius).add_(1)).masked_fill_(far, 0.0)
        weight /= weight.sum(-1, keepdim=True) + SUM_EPSILON
        if self_weight is not None:
            weight.scatter_(2, anchor, self_weight)
        collected = weight @ values[samples]
        if pillars is not None:
            own = _rows(values[samples], anchor)
            collected = torch.where(pillars[samples, block, None], own, collected)
        output[samples, block] = collected.masked_fill_(anchors[samples, block, None] < 0, 0.0).to(
            features.dtype
        )
    return output


def are_pillars(scores: Tensor, anchors: Tensor, share: int, of_shares: int) -> Tensor:
    """Return [B, M] bool, which anchors have a score at or above a quantile of all of their sample's, NaN left out.

    A quantile between two of them lies above the lower one, so the upper one is the least that counts: an anchor is a pillar
    where more scores than lie below that one are at most its own. No number has to be interpolated, nor sorted.

    Args:
        scores: [B, N] float32.
        anchors: [B, M] int64, -1 = filler, which is none.
        share: Numerator of the quantile.
        of_shares: Its denominator.
    """
    own = scores.gather(1, anchors.clamp(min=0)).masked_fill_(anchors < 0, torch.nan)
    least = ((own == own).sum(1) - 1).clamp_(min=0).mul_(share).add_(of_shares - 1) // of_shares
    # NaN counts as infinite in the row that is searched: of what is infinite, any number is enough.
    ascending = torch.where(own == own, own, torch.inf).sort(dim=1).values
    at_most = torch.searchsorted(ascending, own, right=True)
    return (at_most > least[:, None]) & (own == own)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Gather [B, N, X] at [B, M, 1] int64 into [B, M, X]."""
    return tensor.gather(1, index.expand(-1, -1, tensor.shape[2]))
