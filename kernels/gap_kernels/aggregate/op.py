"""``gap_kernels::spatial_aggregate``: registration, fake kernel and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, no_gradient, operator
from ..validation import FLOAT_DTYPES, ShapeChecker, check_range, describe, is_int
from . import reference


@operator(
    "spatial_aggregate(Tensor features, Tensor similarity_features, Tensor anchors, SymInt width, float radius,"
    " Tensor? pillars, float? self_weight) -> Tensor"
)
def spatial_aggregate_op(
    features: Tensor,
    similarity_features: Tensor,
    anchors: Tensor,
    width: int,
    radius: float,
    pillars: Tensor | None,
    self_weight: float | None,
) -> Tensor:
    """Run the operator; see :func:`gap_kernels.spatial_aggregate` and ``reference.py``."""
    if anchors.is_cpu:
        check_range("anchors", anchors, -1, features.shape[1] - 1)
    exact = torch.float64 in (features.dtype, similarity_features.dtype)
    # Below 1 every radius is the same: an anchor reaches itself alone. The smallest ones are 0 in float32.
    radius = max(radius, 0.5)
    given = (features, similarity_features, anchors, width, radius, pillars, self_weight)
    if not exact and use_triton(features):
        from . import kernel

        return kernel.spatial_aggregate(*given)
    return reference.spatial_aggregate(*given)


@fake("spatial_aggregate")
def _(
    features: Tensor,
    similarity_features: Tensor,
    anchors: Tensor,
    width: int,
    radius: float,
    pillars: Tensor | None,
    self_weight: float | None,
) -> Tensor:
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
    """Check the arguments of :func:`gap_kernels.spatial_aggregate`.

    Raises:
        ValueError: if one has another shape, dtype or device than documented, or is out of range.
    """
    shapes = ShapeChecker()
    shapes.check("features", features, "B N C", FLOAT_DTYPES)
    shapes.check("similarity_features", similarity_features, "B N E", FLOAT_DTYPES)
    shapes.check("anchors", anchors, "B M", (torch.int64,))
    if pillars is not None:
        shapes.check("pillars", pillars, "B M", (torch.bool,))
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(is_int(size) for size in grid):
        raise ValueError(f"grid: expected two ints, (H, W), got {describe(grid)}")
    height, width = grid
    if height < 1 or width < 1 or height * width != features.shape[1]:
        raise ValueError(
            f"grid: expected H, W >= 1 with H * W = {features.shape[1]} (N of features), got {tuple(grid)}"
        )
    if not _is_number(radius) or not radius > 0:  # NaN isn't greater either
        raise ValueError(f"radius: expected a float > 0, got {describe(radius)}")
    if self_weight is not None and not _is_number(self_weight):
        raise ValueError(f"self_weight: expected a float or None, got {describe(self_weight)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymFloat)) and not isinstance(value, bool)
