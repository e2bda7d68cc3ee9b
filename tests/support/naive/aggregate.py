"""Spatial aggregation as a loop over anchors and patches."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def cosine(left: list[float], right: list[float]) -> float:
    lengths = math.hypot(*left) * math.hypot(*right)
    return math.fsum(a * b for a, b in zip(left, right, strict=True)) / lengths if lengths else 0.0


def at_or_above(levels: list[float], quantile: float) -> list[bool]:
    """Which of some numbers are at or above a quantile of them, by linear interpolation; NaN is no number."""
    ascending = sorted(level for level in levels if level == level)
    place = Fraction(str(quantile)) * max(len(ascending) - 1, 0)
    # What lies between two of them is above the lower one, and so is the quantile where they are apart.
    least = ascending[math.ceil(place)] if ascending else math.inf
    return [level >= least for level in levels]


def oracle(
    features: Tensor,
    similarity_features: Tensor,
    anchors: Tensor,
    grid: tuple[int, int],
    radius: float,
    pillars: Tensor | None = None,
    self_weight: float | None = 1.0,
    scores: Tensor | None = None,
    pillar_quantile: float | None = None,
) -> Tensor:
    """Result [B, M, C] from the definition, one anchor and patch at a time."""
    batch, _, channels = features.shape
    if scores is not None and pillar_quantile is not None:
        lines = [[score[anchor] if anchor >= 0 else math.nan for anchor in line]
                 for line, score in zip(anchors.tolist(), scores.tolist(), strict=True)]  # fmt: skip
        pillars = torch.tensor([at_or_above(line, pillar_quantile) for line in lines]).view(anchors.shape)
    collected = torch.zeros(batch, anchors.shape[1], channels, dtype=torch.float64)
    for b in range(batch):
        compared = similarity_features[b].double().tolist()
        for m, anchor in enumerate(anchors[b].tolist()):
            if anchor < 0:
                continue
            weights = {}
            for row in range(grid[0]):
                for column in range(grid[1]):
                    patch = row * grid[1] + column
                    distance = math.dist((row, column), divmod(anchor, grid[1]))
                    similarity = max(0.0, cosine(compared[anchor], compared[patch]))
                    weights[patch] = similarity * (1 - min(1.0, distance / radius))
            total = math.fsum(weights.values()) + 1e-8
            weights = {patch: weight / total for patch, weight in weights.items()}
            if self_weight is not None:
                weights[anchor] = self_weight
            if pillars is not None and bool(pillars[b, m]):
                weights = {anchor: 1.0}
            for patch, weight in weights.items():
                collected[b, m] += weight * features[b, patch].double()
    return collected
