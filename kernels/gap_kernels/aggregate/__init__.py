"""Anchors of a patch grid that collect the features of patches which are similar and near."""

from __future__ import annotations

from torch import Tensor

from .op import check_aggregate, check_pillars, spatial_aggregate_op

__all__ = ["spatial_aggregate"]


def spatial_aggregate(
    features: Tensor,
    similarity_features: Tensor,
    anchors: Tensor,
    grid: tuple[int, int],
    *,
    radius: float,
    pillars: Tensor | None = None,
    self_weight: float | None = 1.0,
    scores: Tensor | None = None,
    pillar_quantile: float | None = None,
) -> Tensor:
    """Return for each anchor the weighted mean of the patches around it, as Nüwa aggregates (arXiv 2602.02951).

    Patch ``j`` of the grid is at row ``j // W``, column ``j % W``. Its weight for anchor ``i`` is

        ``relu(cos(e_i, e_j)) * (1 - min(1, d(i, j) / radius))``

    with ``e`` the rows of ``similarity_features`` and ``d`` the Euclidean distance in patches. The weights of an anchor
    are divided by their sum (plus 1e-8), and its own is then replaced by ``self_weight``. Each cosine is computed once,
    and the weights of a block of anchors are stored meanwhile: at most 4 million, or those of one anchor of each sample.

    Args:
        features: [B, N, C] float32, float16, bfloat16 or float64: what is collected, one row per patch; any strides.
        similarity_features: [B, N, E], any of those dtypes: what patches are compared by, normalised here; any
            strides. A vector of zeros has cosine 0 to everything, itself included.
        anchors: [B, M] int64, patches that collect, in any order; -1 = filler.
        grid: (H, W), rows and columns of the grid, H * W = N.
        radius: Distance in patches from which on weights are 0, > 0. Nüwa's code: ``sqrt(280)`` on 24 x 24.
        pillars: [B, M] bool, True = an anchor that collects nothing: its row is its own features, whatever
            ``self_weight`` is. None: no anchor is one.
        self_weight: Weight of an anchor's own features after the division. With 1.0, an anchor is itself plus a
            weighted mean of its neighbours, as in Nüwa's code for LLaVA. None leaves it what the division gives,
            as in that for Qwen.
        scores: [B, N] float32, by which pillars are found, in place of ``pillars``; with ``pillar_quantile``.
        pillar_quantile: In 0..1, with at most 9 decimals, read as the decimal that was written: anchors whose score is at
            or above this quantile of their sample's anchors are pillars. One whose score is NaN is none, and doesn't count.

    Returns:
        [B, M, C] in the dtype of ``features``, computed in float32 (float64 if either input is). Filler rows are 0.
        NaN in a similarity vector spoils the anchors nearer than ``radius``. NaN or infinity in ``features`` spoils its
        channel in every row of its sample but pillars, as in any matrix product: a weight of 0 doesn't hide it.

    Raises:
        ValueError: If an argument has another shape, dtype or device, ``grid`` isn't that of N patches, ``radius``
            isn't positive, or of ``scores`` and ``pillar_quantile`` one is missing, or ``pillars`` are given too; on the CPU
            also for an anchor out of range (elsewhere it counts as filler).
    """
    check_aggregate(features, similarity_features, anchors, grid, radius, pillars, self_weight)
    above = check_pillars(scores, pillar_quantile, pillars, features)
    given = (features, similarity_features, anchors, grid[1], radius, pillars, self_weight)
    return spatial_aggregate_op(*given, scores, *above)
