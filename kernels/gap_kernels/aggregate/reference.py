"""Spatial aggregation in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import row_blocks

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

    Returns:
        [B, M, C] in the dtype of ``features``.
    """
    exact = torch.float64 in (features.dtype, similarity_features.dtype)
    dtype = torch.float64 if exact else torch.float32
    values = features.to(dtype)
    unit = F.normalize(similarity_features.to(dtype), dim=-1, eps=NORM_EPSILON)
    patch = torch.arange(features.shape[1], device=features.device)
    output = features.new_empty((*anchors.shape, features.shape[2]))
    for block in row_blocks(anchors.shape[1], unit.shape[0] * unit.shape[1]):
        anchor = anchors[:, block].clamp(min=0)[:, :, None]  # [B, m, 1]
        cosine = _rows(unit, anchor) @ unit.transpose(-1, -2)  # [B, m, N]
        down, right = patch // width - anchor // width, patch % width - anchor % width
        distance = (down.square() + right.square()).to(dtype).sqrt()
        # `where`, not a product: the similarity of what is too far away may be NaN.
        weight = torch.where(distance < radius, cosine.relu() * (1 - distance / radius), 0.0)
        weight = weight / (weight.sum(-1, keepdim=True) + SUM_EPSILON)
        if self_weight is not None:
            weight = torch.where(patch == anchor, self_weight, weight)
        collected = weight @ values
        if pillars is not None:
            collected = torch.where(pillars[:, block, None], _rows(values, anchor), collected)
        output[:, block] = torch.where(anchors[:, block, None] >= 0, collected, 0.0).to(features.dtype)
    return output


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Gather [B, N, X] at [B, M, 1] int64 into [B, M, X]."""
    return tensor.gather(1, index.expand(-1, -1, tensor.shape[2]))
