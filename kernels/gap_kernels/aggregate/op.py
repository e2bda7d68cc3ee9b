"""``gap_kernels::spatial_aggregate``: registration, fake kernel and checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from ..prune.coverage import SPREAD_DIGITS, as_ratio, is_short
from ..validation import (
    FLOAT_DTYPES,
    MAX_NUMBER,
    ShapeChecker,
    check_grid,
    check_range,
    describe,
    is_finite,
    is_number,
)
from . import reference


@operator("spatial_aggregate")
def spatial_aggregate_op(
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
    """Run the operator; see `gap_kernels.spatial_aggregate` and ``reference.py``."""
    if anchors.is_cpu:
        check_range("anchors", anchors, -1, features.shape[1] - 1)
    exact = torch.float64 in (features.dtype, similarity_features.dtype)
    # Below 1 every radius is the same: an anchor reaches itself alone. The smallest ones are 0 in float32.
    radius = max(radius, 0.5)
    given = (
        features, similarity_features, anchors, width, radius, pillars, self_weight, scores, share, of_shares
    )  # fmt: skip
    if not exact and use_triton(features):
        from . import kernel

        return kernel.spatial_aggregate(*given)
    return reference.spatial_aggregate(*given)


@fake("spatial_aggregate")
def _(features: Tensor, anchors: Tensor) -> Tensor:
    return features.new_empty((*anchors.shape, features.shape[2]))


no_gradient("spatial_aggregate")


def check_aggregate(
    features: Tensor,
    similarity_features: Tensor,
    anchors: Tensor,
    grid: tuple[int, int],
    radius: float,
    pillars: Tensor | None,
    self_weight: float | None,
) -> None:
    """Check the arguments of `gap_kernels.spatial_aggregate`.

    Raises:
        ValueError: If one has another shape, dtype or device than documented, or is out of range.
    """
    shapes = ShapeChecker()
    shapes.check("features", features, "B N C", FLOAT_DTYPES)
    shapes.check("similarity_features", similarity_features, "B N E", FLOAT_DTYPES)
    shapes.check("anchors", anchors, "B M", (torch.int64,))
    if pillars is not None:
        shapes.check("pillars", pillars, "B M", (torch.bool,))
    check_grid("grid", grid)
    if grid[0] * grid[1] != features.shape[1]:
        raise ValueError(f"grid: expected H * W = {features.shape[1]} (N of features), got {describe(grid)}")
    check_radius(radius)
    check_self_weight(self_weight)


def check_pillars(
    scores: Tensor | None, quantile: object, pillars: Tensor | None, features: Tensor
) -> tuple[int, int]:
    """Check what finds the pillars among the anchors of ``features`` [B, N, C] by their scores.

    Returns:
        The quantile as the operator takes it: numerator and denominator; 0 and 1 where none is given.

    Raises:
        ValueError: If one of ``scores`` [B, N] and ``quantile`` is missing, or isn't as documented, or ``pillars`` are
            given too.
    """
    if scores is None and quantile is None:
        return 0, 1
    if scores is None:
        raise ValueError(
            f"scores: expected a tensor [B, N] with pillar_quantile {describe(quantile)}, got None"
        )
    shapes = ShapeChecker()
    shapes.check("features", features, "B N C", FLOAT_DTYPES)
    shapes.check("scores", scores, "B N", (torch.float32,))
    if not is_number(quantile) or not 0 <= quantile <= 1 or not is_short(float(quantile)):
        raise ValueError(
            f"pillar_quantile: expected a float in 0..1 with at most {SPREAD_DIGITS} decimals, got {describe(quantile)}"
        )
    if pillars is not None:
        raise ValueError(f"pillars: expected None with pillar_quantile={quantile}, got {describe(pillars)}")
    return as_ratio(float(quantile))


def check_radius(radius: object) -> None:
    """Check the distance from which on weights are 0.

    Raises:
        ValueError: If it isn't a number > 0; infinity is one.
    """
    if not is_number(radius) or not (radius == math.inf or 0 < radius <= MAX_NUMBER):  # NaN is neither
        raise ValueError(f"radius: expected a float > 0, got {describe(radius)}")


def check_self_weight(self_weight: object) -> None:
    """Check the weight of an anchor's own features.

    Raises:
        ValueError: If it is neither a finite number nor None.
    """
    if self_weight is not None and not is_finite(self_weight):
        raise ValueError(f"self_weight: expected a finite float or None, got {describe(self_weight)}")
