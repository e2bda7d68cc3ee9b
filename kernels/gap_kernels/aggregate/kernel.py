# mypy: disable-error-code="no-untyped-def"
"""Spatial aggregation in Triton: two launches, each of which computes nothing twice.

1. ``spatial_weights_kernel``: the weights of one tile of anchors and patches, from their cosines, which are added up over
   chunks of the similarity vectors;
2. ``spatial_aggregate_kernel``: one tile of anchors and channels. Patches go by: their features are added up with these
   weights. As an anchor's weights are divided by their sum, both sums are kept and divided at the end; an own weight that
   is given stays out of the weighted sum and is added behind the division.

In one launch, each tile of channels would have to compute the cosines anew, or channels would have to wait for one another
in a program, of which there would be few: an anchor tile is 16 of about a hundred. Where anchors times patches are many,
anchors come in blocks, so that the weights of one block are all that is ever stored. Sums have a fixed order: runs agree
bit for bit.

Dot products have their operands in the dtype of the inputs and add up in float32; float32 is multiplied in float32, never
in TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..backends import triton_is_interpreted
from ..blocks import row_blocks
from ..flash_attention.kernel import load_vectors
from ..launch import cdiv, launch, next_power_of_2
from ..prune.kernel import with_whole_rows
from . import reference

NORM_EPSILON = tl.constexpr(reference.NORM_EPSILON)
SUM_EPSILON = tl.constexpr(reference.SUM_EPSILON)


@triton.jit
def inverse_norms(squares):
    """Return what vectors are multiplied by to have length 1, from their sums of squares."""
    return 1.0 / tl.maximum(tl.sqrt(squares), NORM_EPSILON)


@triton.jit
def cosines(
    left_pointer,
    left_usable,
    right_pointer,
    right_usable,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the cosines [BLOCK_LEFT, BLOCK_RIGHT] of two tiles of vectors, 0 where one isn't usable."""
    products = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    left_squares = tl.zeros((BLOCK_LEFT,), tl.float32)
    right_squares = tl.zeros((BLOCK_RIGHT,), tl.float32)
    for start in range(0, E, BLOCK_E):
        left = load_vectors(left_pointer, left_usable, start, E, BLOCK_E, UPCAST)
        right = load_vectors(right_pointer, right_usable, start, E, BLOCK_E, UPCAST)
        products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
        left_squares += tl.sum(left.to(tl.float32) * left.to(tl.float32), 1)
        right_squares += tl.sum(right.to(tl.float32) * right.to(tl.float32), 1)
    return products * inverse_norms(left_squares)[:, None] * inverse_norms(right_squares)[None, :]


@triton.jit
def locate_anchors(anchors, slot, batch, first, count, num_anchors, num_patches):
    """Locate some anchors of a block: ``count`` from ``first`` on, of ``num_anchors``.

    Returns:
        Their places in [B, M], their patches, which of them are in the block, and which of these aren't filler.
    """
    place = batch * num_anchors + first + slot
    inside = slot < count
    anchor = tl.load(anchors + place, mask=inside, other=-1)
    return place, anchor, inside, (anchor >= 0) & (anchor < num_patches)


# What changes from image to image isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["num_patches", "num_anchors", "first", "count", "width"])
def spatial_weights_kernel(
    similarity,
    anchors,
    weights,
    similarity_stride_b,
    similarity_stride_n,
    weights_stride_m,
    num_patches,
    num_anchors,
    first,
    count,
    width,
    radius_squared,
    inverse_radius,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Weights of one tile of anchors and patches, not yet divided by their sum: weights [B, count, stride] float32.

    Grid (B * anchor tiles * patch tiles). The columns from ``num_patches`` on, up to the stride, become 0.
    """
    patch_tiles = weights_stride_m // BLOCK_N
    anchor_tiles = tl.cdiv(count, BLOCK_M)
    tile = tl.program_id(0) // patch_tiles % anchor_tiles
    batch = (tl.program_id(0) // patch_tiles // anchor_tiles).to(tl.int64)
    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    _, anchor, inside, real = locate_anchors(anchors, slot, batch, first, count, num_anchors, num_patches)
    patch = tl.program_id(0) % patch_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    usable = patch < num_patches
    similarity += batch * similarity_stride_b
    # 0 for what isn't usable, as nothing but zeros is read of it.
    cosine = cosines(
        similarity + anchor * similarity_stride_n, real,
        similarity + patch.to(tl.int64) * similarity_stride_n, usable,
        BLOCK_M, BLOCK_N, E, BLOCK_E, UPCAST,
    )  # fmt: skip
    index = anchor.to(tl.int32)
    down = (patch // width)[None, :] - (index // width)[:, None]
    right = (patch % width)[None, :] - (index % width)[:, None]
    distance_squared = (down * down + right * right).to(tl.float32)
    near = distance_squared < radius_squared
    positive = tl.where(cosine < 0.0, 0.0, cosine)  # unlike a maximum this keeps NaN
    weight = tl.where(near, positive * (1.0 - tl.sqrt(distance_squared) * inverse_radius), 0.0)
    row = weights + (batch * count + slot)[:, None] * weights_stride_m
    tl.store(row + patch[None, :], weight, mask=inside[:, None])


@triton.jit
def are_pillars(
    scores,
    anchors,
    own,
    share,
    of_shares,
    num_anchors,
    num_patches,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return which of a tile of anchors have a score, ``own``, at or above the quantile of their sample's ``anchors`` [M].

    Args:
        scores: [N] float32; NaN is at or above nothing.
        anchors: [M], filler outside 0..N-1.
        own: [BLOCK_M] float32, NaN for what is no anchor.
        share: Numerator of the quantile.
        of_shares: Its denominator.
        num_anchors: M.
        num_patches: N.
        BLOCK_M: Anchors of the tile.
        BLOCK: How many others are compared at a time.
    """
    at_most = tl.zeros((BLOCK_M,), tl.int32)
    number = tl.full((), 0, tl.int64)
    for start in range(0, num_anchors, BLOCK):
        place = start + tl.arange(0, BLOCK)
        anchor = tl.load(anchors + place, mask=place < num_anchors, other=-1)
        other = tl.load(scores + anchor, mask=(anchor >= 0) & (anchor < num_patches), other=float("nan"))
        at_most += tl.sum((other[None, :] <= own[:, None]).to(tl.int32), 1)
        number += tl.sum((other == other).to(tl.int32), 0)
    # That many are below the least that counts, which is the quantile's upper neighbour.
    below = (tl.maximum(number - 1, 0) * share + of_shares - 1) // of_shares
    return at_most > below


@triton.jit(
    do_not_specialize=[
        "num_patches",
        "num_anchors",
        "first",
        "count",
        "scores_stride_b",
        "share",
        "of_shares",
    ]
)
def spatial_aggregate_kernel(
    features,
    weights,
    anchors,
    pillars,
    scores,
    output,
    features_stride_b,
    features_stride_n,
    weights_stride_m,
    num_patches,
    num_anchors,
    first,
    count,
    scores_stride_b,
    share,
    of_shares,
    self_weight,
    C: tl.constexpr,
    GIVEN_SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Collect for one tile of anchors and channels: output [B, M, C]. Grid (B * anchor tiles * channel tiles).

    GIVEN_SELF says whether ``self_weight`` is the own weight of an anchor.
    """
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    anchor_tiles = tl.cdiv(count, BLOCK_M)
    channel = tl.program_id(0) % channel_tiles * BLOCK_C
    tile = tl.program_id(0) // channel_tiles % anchor_tiles
    batch = (tl.program_id(0) // channel_tiles // anchor_tiles).to(tl.int64)
    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    place, anchor, inside, real = locate_anchors(anchors, slot, batch, first, count, num_anchors, num_patches)
    features += batch * features_stride_b
    row = weights + (batch * count + slot)[:, None] * weights_stride_m

    index = anchor.to(tl.int32)
    collected = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, num_patches, BLOCK_N):
        patch = start + tl.arange(0, BLOCK_N)
        weight = tl.load(row + patch[None, :], mask=inside[:, None], other=0.0)
        total += weight
        if GIVEN_SELF:
            weight = tl.where(patch[None, :] == index[:, None], 0.0, weight)
        values = load_vectors(
            features + patch.to(tl.int64) * features_stride_n,
            patch < num_patches,
            channel,
            C,
            BLOCK_C,
            UPCAST,
        )
        collected = tl.dot(weight.to(values.dtype), values, collected, input_precision="ieee")

    own = load_vectors(features + anchor * features_stride_n, real, channel, C, BLOCK_C, UPCAST).to(
        tl.float32
    )
    collected /= (tl.sum(total, 1) + SUM_EPSILON)[:, None]
    if GIVEN_SELF:
        collected += self_weight * own
    if pillars is not None:
        pillar = tl.load(pillars + place, mask=inside, other=0) != 0
        collected = tl.where(pillar[:, None], own, collected)
    if scores is not None:
        scores += batch * scores_stride_b
        score = tl.load(scores + anchor, mask=real, other=float("nan"))
        pillar = are_pillars(
            scores,
            anchors + batch * num_anchors,
            score,
            share,
            of_shares,
            num_anchors,
            num_patches,
            BLOCK_M,
            BLOCK_N,
        )
        collected = tl.where(pillar[:, None], own, collected)
    # A weight of 0 doesn't hide the NaN of a patch from a filler row.
    collected = tl.where(real[:, None], collected, 0.0)
    c = channel + tl.arange(0, BLOCK_C)
    tl.store(output + place[:, None] * C + c[None, :], collected, mask=inside[:, None] & (c < C)[None, :])


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
    """Launch the kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, num_patches, channels = features.shape
    num_anchors = anchors.shape[1]
    output = torch.empty((batch, num_anchors, channels), dtype=features.dtype, device=features.device)
    if output.numel() == 0:
        return output

    features, similarity = with_whole_rows(features), with_whole_rows(similarity_features)
    length = similarity.shape[2]
    anchors = anchors.contiguous()
    pillars = None if pillars is None else pillars.contiguous().view(torch.uint8)
    scores = None if scores is None else with_whole_rows(scores)
    of_weights, of_features = tiles.spatial_weights(similarity.dtype), tiles.spatial_aggregate(features.dtype)
    channel_block = part_of(channels, of_features.part)
    flags = {"UPCAST": triton_is_interpreted()}
    widest = max(of_weights.columns, of_features.columns)
    row = cdiv(num_patches, widest) * widest  # whole tiles, so that nothing need be masked
    for block in row_blocks(num_anchors, batch * row):
        count = min(block.stop, num_anchors) - block.start
        weights = torch.empty((batch, count, row), dtype=torch.float32, device=features.device)
        anchor_tiles = batch * cdiv(count, of_weights.rows)
        launch(
            spatial_weights_kernel,
            (anchor_tiles * (row // of_weights.columns),),
            (similarity, anchors, weights),
            (*similarity.stride()[:2], row),
            (num_patches, num_anchors, block.start, count, width),
            (radius * radius, 1 / radius),
            {
                "E": length,
                "BLOCK_M": of_weights.rows,
                "BLOCK_N": of_weights.columns,
                "BLOCK_E": part_of(length, of_weights.part),
                **flags,
            },
            **of_weights.options(),
        )
        launch(
            spatial_aggregate_kernel,
            (batch * cdiv(count, of_features.rows) * cdiv(channels, channel_block),),
            (features, weights, anchors, pillars, scores, output),
            (*features.stride()[:2], row),
            (
                num_patches,
                num_anchors,
                block.start,
                count,
                0 if scores is None else scores.stride(0),
                share,
                of_shares,
            ),
            (0.0 if self_weight is None else self_weight,),
            {
                "C": channels,
                "GIVEN_SELF": self_weight is not None,
                "BLOCK_M": of_features.rows,
                "BLOCK_N": of_features.columns,
                "BLOCK_C": channel_block,
                **flags,
            },
            **of_features.options(),
        )
    return output


def part_of(length: int, part: int) -> int:
    """Return how much of vectors a program reads at a time; less of those of odd lengths, whose pointers take registers."""
    return min(next_power_of_2(max(16, length)), part if length % 16 == 0 else min(part, 32))
