# mypy: disable-error-code="no-untyped-def"
"""Spatial aggregation in Triton: one launch, in which weights exist a tile at a time.

A program has one tile of anchors and one of channels. Patches go by: their cosines to the anchors are added up over
chunks of the similarity vectors, become weights, and multiply the patches' features. As an anchor's weights are divided
by their sum, both sums are kept and divided at the end; an own weight that is given stays out of the weighted sum and is
added behind the division. Sums have a fixed order: runs agree bit for bit.

Dot products have their operands in the dtype of the inputs and add up in float32; float32 is multiplied in float32, never
in TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_is_interpreted
from ..flash_attention.kernel import load_vectors
from ..importance.kernel import part_of
from ..launch import cdiv, launch, next_power_of_2
from . import reference

NORM_EPSILON = tl.constexpr(reference.NORM_EPSILON)
SUM_EPSILON = tl.constexpr(reference.SUM_EPSILON)


@triton.jit
def inverse_norms(squares):
    """Return what vectors are multiplied by to have length 1, from their sums of squares."""
    return 1.0 / tl.maximum(tl.sqrt(squares), NORM_EPSILON)


# What changes from image to image isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["num_patches", "num_anchors", "width"])
def spatial_aggregate_kernel(
    features,
    similarity,
    anchors,
    pillars,
    output,
    features_stride_b,
    features_stride_n,
    similarity_stride_b,
    similarity_stride_n,
    num_patches,
    num_anchors,
    width,
    radius_squared,
    inverse_radius,
    self_weight,
    C: tl.constexpr,
    E: tl.constexpr,
    GIVEN_SELF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Collect for one tile of anchors and channels: output [B, M, C]. Grid (B * anchor tiles * channel tiles).

    GIVEN_SELF says whether ``self_weight`` is the own weight of an anchor.
    """
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    anchor_tiles = tl.cdiv(num_anchors, BLOCK_M)
    channel = tl.program_id(0) % channel_tiles * BLOCK_C
    tile = tl.program_id(0) // channel_tiles % anchor_tiles
    batch = (tl.program_id(0) // channel_tiles // anchor_tiles).to(tl.int64)
    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    place = batch * num_anchors + slot
    anchor = tl.load(anchors + place, mask=slot < num_anchors, other=-1)
    real = (anchor >= 0) & (anchor < num_patches)
    features += batch * features_stride_b
    similarity += batch * similarity_stride_b
    own_similarity = similarity + anchor * similarity_stride_n

    own_squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, E, BLOCK_E):
        own = load_vectors(own_similarity, real, start, E, BLOCK_E, UPCAST).to(tl.float32)
        own_squares += tl.sum(own * own, 1)
    own_scale = inverse_norms(own_squares)

    index = anchor.to(tl.int32)
    collected = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, num_patches, BLOCK_N):
        patch = first + tl.arange(0, BLOCK_N)
        usable = patch < num_patches
        vectors = similarity + patch.to(tl.int64) * similarity_stride_n
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, E, BLOCK_E):
            own = load_vectors(own_similarity, real, start, E, BLOCK_E, UPCAST)
            other = load_vectors(vectors, usable, start, E, BLOCK_E, UPCAST)
            products = tl.dot(own, tl.trans(other), products, input_precision="ieee")
            squares += tl.sum(other.to(tl.float32) * other.to(tl.float32), 1)
        # 0 for what isn't usable, as nothing but zeros was read of it.
        cosine = products * own_scale[:, None] * inverse_norms(squares)[None, :]
        down = (patch // width)[None, :] - (index // width)[:, None]
        right = (patch % width)[None, :] - (index % width)[:, None]
        distance_squared = (down * down + right * right).to(tl.float32)
        near = distance_squared < radius_squared
        positive = tl.where(cosine < 0.0, 0.0, cosine)  # unlike a maximum this keeps NaN
        weight = tl.where(near, positive * (1.0 - tl.sqrt(distance_squared) * inverse_radius), 0.0)
        total += tl.sum(weight, 1)
        if GIVEN_SELF:
            weight = tl.where(patch[None, :] == index[:, None], 0.0, weight)
        values = load_vectors(
            features + patch.to(tl.int64) * features_stride_n, usable, channel, C, BLOCK_C, UPCAST
        )
        collected = tl.dot(weight.to(values.dtype), values, collected, input_precision="ieee")

    own = load_vectors(features + anchor * features_stride_n, real, channel, C, BLOCK_C, UPCAST).to(
        tl.float32
    )
    collected /= (total + SUM_EPSILON)[:, None]
    if GIVEN_SELF:
        collected += self_weight * own
    if pillars is not None:
        pillar = tl.load(pillars + place, mask=slot < num_anchors, other=0) != 0
        collected = tl.where(pillar[:, None], own, collected)
    # A weight of 0 doesn't hide the NaN of a patch from a filler row.
    collected = tl.where(real[:, None], collected, 0.0)
    c = channel + tl.arange(0, BLOCK_C)
    inside = (slot < num_anchors)[:, None] & (c < C)[None, :]
    tl.store(output + place[:, None] * C + c[None, :], collected, mask=inside)


def spatial_aggregate(
    features: Tensor,
    similarity_features: Tensor,
    anchors: Tensor,
    width: int,
    radius: float,
    pillars: Tensor | None,
    self_weight: float | None,
) -> Tensor:
    """Launch the kernel; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, num_patches, channels = features.shape
    num_anchors = anchors.shape[1]
    output = torch.empty((batch, num_anchors, channels), dtype=features.dtype, device=features.device)
    if output.numel() == 0:
        return output

    features = features if features.stride(-1) == 1 else features.contiguous()
    similarity = similarity_features
    similarity = similarity if similarity.stride(-1) == 1 else similarity.contiguous()
    pillars = None if pillars is None else pillars.contiguous().view(torch.uint8)
    exact = torch.float32 in (features.dtype, similarity.dtype)
    tiles = tile_options(channels, similarity.shape[2], exact)
    programs = batch * cdiv(num_anchors, tiles["BLOCK_M"]) * cdiv(channels, tiles["BLOCK_C"])
    launch(
        spatial_aggregate_kernel,
        (programs,),
        (features, similarity, anchors.contiguous(), pillars, output),
        (*features.stride()[:2], *similarity.stride()[:2]),
        (num_patches, num_anchors, width),
        (radius * radius, 1 / radius, 0.0 if self_weight is None else self_weight),
        {
            "C": channels,
            "E": similarity.shape[2],
            "GIVEN_SELF": self_weight is not None,
            **tiles,
            "UPCAST": triton_is_interpreted(),
        },
        num_warps=4 if exact else 8,
        num_stages=2,
        # Two programs fit a multiprocessor, or three. Told so, NVIDIA's compiler uses the registers; left alone it
        # spills a few values to fit one more.
        maxnreg=168 if exact else 128,
    )
    return output


def tile_options(channels: int, length: int, exact: bool) -> dict[str, int]:
    """Return tile sizes: what fits the registers and shared memory, chosen without a timing.

    Vectors of C = ``channels`` and E = ``length`` are read a part at a time. ``exact`` says that one of them is float32.
    """
    block_c, block_e = max(16, next_power_of_2(channels)), max(16, next_power_of_2(max(1, length)))
    if exact:
        # Not for tensor cores: operands stay in registers.
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_C": min(block_c, 64), "BLOCK_E": 16}
    return {
        "BLOCK_M": 16,
        "BLOCK_N": 64,
        "BLOCK_C": min(block_c, 32 if channels % 16 else 128),  # pointers of odd lengths take registers
        "BLOCK_E": part_of(length, min(block_e, 64)),
    }
