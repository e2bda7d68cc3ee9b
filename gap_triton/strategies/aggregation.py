"""Nüwa's merge (arXiv 2602.02951): anchors collect similar patches near them, the most important collect nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from gap_kernels import spatial_aggregate
from gap_kernels.aggregate.op import check_radius, check_self_weight
from gap_kernels.precision import without_autocast
from gap_kernels.prune.coverage import is_short
from gap_kernels.validation import check_grid, describe, is_number
from torch import Tensor

from ..constants import Constants
from ..host import to_device
from .merged import Merged, check_merge
from .rows import gather_rows

_RANKS = Constants(64)


@dataclass(frozen=True)
class AggregationRule:
    """Constants of the aggregation. The three published sets are ``LLAVA``, ``LLAVA_NEXT`` and ``QWEN``.

    Attributes:
        pillar_quantile: Anchors whose score is at or above this quantile of the anchors' scores are pillars: their
            features stay their own. In 0..1.
        radius: Distance from which on nothing is collected, > 0.
        radius_in_diagonals: Whether ``radius`` is a share of the grid's diagonal, the distance between the centres of
            opposite corner cells; else it counts patches.
        self_weight: Weight of an anchor's own features; None = what dividing by the sum of the weights leaves.

    Raises:
        ValueError: If one is of another type, or out of range.
    """

    pillar_quantile: float
    radius: float
    radius_in_diagonals: bool
    self_weight: float | None

    def __post_init__(self) -> None:
        if not is_number(self.pillar_quantile) or not 0 <= self.pillar_quantile <= 1:
            raise ValueError(
                f"pillar_quantile: expected a float in 0..1, got {describe(self.pillar_quantile)}"
            )
        check_radius(self.radius)
        if not isinstance(self.radius_in_diagonals, bool):
            raise ValueError(
                f"radius_in_diagonals: expected a bool, got {describe(self.radius_in_diagonals)}"
            )
        check_self_weight(self.self_weight)

    def radius_of(self, grid: tuple[int, int]) -> float:
        """Return the radius in patches on a grid of (H, W)."""
        if not self.radius_in_diagonals:
            return self.radius
        # A grid of one cell has no diagonal. Within a distance of 1 there is only the anchor itself.
        return max(self.radius * math.hypot(grid[0] - 1, grid[1] - 1), 1.0)


LLAVA = AggregationRule(0.55, math.sqrt(280 / (23**2 + 23**2)), True, 1.0)
"""LLaVA-1.5: ``sqrt(280)`` patches on 24 x 24, the only grid there is; the same share of the diagonal on others."""
LLAVA_NEXT = AggregationRule(0.5, math.sqrt(280), False, 1.0)
"""LLaVA-NeXT: ``sqrt(280)`` patches on each of its grids, whatever their size."""
QWEN = AggregationRule(0.1, 0.8, True, None)
"""Qwen2.5-VL: 0.8 of the diagonal; the anchor is one of those that are averaged."""


@without_autocast
def aggregate(
    features: Tensor,
    similarity: Tensor,
    scores: Tensor,
    anchors: Tensor,
    grid: tuple[int, int],
    *,
    rule: AggregationRule,
) -> Merged:
    """Let anchors collect similar patches near them, see `gap_kernels.spatial_aggregate`.

    Every anchor keeps its row. Pillars and constants are those of the released code; the paper has pillars by the norm of
    the key, at the 0.75 quantile.

    Args:
        features: [G, N, C] float32, float16, bfloat16 or float64.
        similarity: [G, N, E], any of those dtypes: what patches are compared by (Nüwa: the mean of the tower's hidden
            states of the last third of its layers).
        scores: [G, N] float32, what anchors were chosen by.
        anchors: [G, M] int64, ascending, distinct; -1 = filler, on the left. Nüwa: ``choose(..., "region")``.
        grid: (H, W), H * W = N.
        rule: The constants.

    Returns:
        M tokens, computed in float32 (float64 if features or similarity are). Where every patch is an anchor, so with
        ``keep = N``, nothing was dropped and nothing changes, which the released code doesn't do. An anchor whose score is
        NaN is no pillar and doesn't count for the quantile.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, or ``grid`` isn't that of N patches;
            on the CPU also for rows out of range or repeated.
    """
    check_merge(features, {"anchors": anchors}, similarity=similarity, scores=scores)
    check_grid("grid", grid)
    if not isinstance(rule, AggregationRule):
        raise ValueError(f"rule: expected an AggregationRule, got {describe(rule)}")
    if not anchors.numel():
        return Merged(anchors, features.new_empty(*anchors.shape, features.shape[2]))
    collected = _collect(features, similarity, scores, anchors, grid, rule)
    num_rows = features.shape[1]
    if anchors.shape[1] >= num_rows:
        complete = ((anchors >= 0).sum(1) == num_rows)[:, None, None]
        collected = torch.where(complete, gather_rows(features, anchors), collected)
    return Merged(anchors, collected)


@without_autocast
def aggregate_without_filler(
    features: Tensor,
    similarity: Tensor,
    scores: Tensor,
    anchors: Tensor,
    grid: tuple[int, int],
    *,
    rule: AggregationRule,
) -> Merged:
    """Let anchors collect as `aggregate` does, unchecked: fewer than N, and no filler among them. Arguments as there."""
    return Merged(anchors, _collect(features, similarity, scores, anchors, grid, rule))


def _collect(
    features: Tensor,
    similarity: Tensor,
    scores: Tensor,
    anchors: Tensor,
    grid: tuple[int, int],
    rule: AggregationRule,
) -> Tensor:
    """What anchors [G, M], -1 = filler, collect by ``scores`` [G, N]: [G, M, C]."""
    found: dict[str, Any] = {"scores": scores, "pillar_quantile": rule.pillar_quantile}
    if not is_short(float(rule.pillar_quantile)):  # which the operator multiplies by
        anchor_scores = scores.gather(1, anchors.clamp(min=0)).masked_fill_(anchors < 0, torch.nan)
        found = {"pillars": _at_or_above(anchor_scores, rule.pillar_quantile)}
    radius = rule.radius_of(grid)
    return spatial_aggregate(
        features, similarity, anchors, grid, radius=radius, self_weight=rule.self_weight, **found
    )


def _at_or_above(scores: Tensor, quantile: float) -> Tensor:
    """Return [G, M] bool, which of ``scores`` [G, M] are at or above a quantile of their row, NaN left out.

    A quantile between two of them lies above the lower one, so the upper one is the least that counts. No number has to be
    interpolated.
    """
    ranks = _RANKS.get(
        (scores.shape[1], quantile, scores.device),
        scores.device,
        lambda: to_device(_least_ranks(scores.shape[1], quantile), scores.device),
    )
    real = (scores == scores).sum(1, keepdim=True)
    least = scores.sort(dim=1).values.gather(1, ranks[real])  # NaN is sorted to the end
    return scores >= least


def _least_ranks(most: int, quantile: float) -> list[int]:
    """Return by n in 0..``most`` the rank, among n ascending numbers, of the least at or above their quantile."""
    over, under = Fraction(repr(float(quantile))).as_integer_ratio()
    return [max(-(-over * (number - 1) // under), 0) for number in range(most + 1)]
