# mypy: disable-error-code="no-untyped-def"
"""Merging tokens by the cosines of their keys in Triton.

`collect_nearest`, in three launches:

1. ``cosines_kernel``: the cosines of a tile of kept tokens to a tile of tokens; and which tokens are dropped;
2. the selection of the largest of each row, by ``select/kernel.py``;
3. ``collect_kernel``: a tile of channels of one token with those that it takes in; or of the sum of what is dropped.

`merge_nearest`, in two, which store no cosine:

1. ``assign_kernel``: a tile of tokens goes over the targets, and keeps the best;
2. ``merge_kernel``: a tile of targets and channels. Tokens go by, and add to the target that they go to.

Where kept tokens times tokens are many, kept ones come in blocks, so that the cosines of one block are all that is ever
stored. Products have their operands in the dtype of the inputs and add up in float32, in a fixed order: runs agree bit for
bit; float32 is multiplied in float32, never in TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..aggregate.kernel import cosines, part_of
from ..backends import triton_is_interpreted
from ..blocks import row_blocks
from ..flash_attention.kernel import load_vectors
from ..launch import cdiv, launch, next_power_of_2
from ..prune.kernel import with_whole_rows
from ..select import kernel as select
from . import reference

NAN_COSINE = tl.constexpr(reference.NAN_COSINE)
NO_TARGET = tl.constexpr(reference.NO_TARGET)
MEMBER_BLOCK = tl.constexpr(64)
"""Of an index, how many entries are compared with a tile of tokens at a time."""


@triton.jit
def are_in(token, index, length, BLOCK: tl.constexpr):
    """Return which of a tile of tokens are in ``index`` [length]."""
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, MEMBER_BLOCK):
        entry = start + tl.arange(0, MEMBER_BLOCK)
        row = tl.load(index + entry, mask=entry < length, other=-1)
        found |= tl.max((token[:, None] == row[None, :]).to(tl.int32), 1)
    return found > 0


# What changes from image to image isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["num_rows", "num_kept", "first", "count"])
def cosines_kernel(
    keys,
    kept,
    cosine,
    dropped,
    stride_b,
    stride_n,
    num_rows,
    num_kept,
    first,
    count,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Cosines of ``count`` kept tokens from ``first`` on to all tokens: cosine [B, count, N] float32, NaN to themselves.

    The first tile of kept tokens writes ``dropped`` [B, N], which tokens are not kept. Grid (B * kept tiles * token tiles).
    """
    token_tiles = tl.cdiv(num_rows, BLOCK_N)
    kept_tiles = tl.maximum(tl.cdiv(count, BLOCK_M), 1)  # where nothing is kept, all is dropped
    tile = tl.program_id(0) // token_tiles % kept_tiles
    batch = (tl.program_id(0) // token_tiles // kept_tiles).to(tl.int64)
    token = tl.program_id(0) % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    kept += batch * num_kept
    own = tl.load(kept + first + slot, mask=slot < count, other=-1)
    keys += batch * stride_b
    found = cosines(
        keys + own * stride_n, own >= 0, keys + token.to(tl.int64) * stride_n, token < num_rows,
        BLOCK_M, BLOCK_N, E, BLOCK_E, UPCAST,
    )  # fmt: skip
    found = tl.where((own >= 0)[:, None] & (own[:, None] != token[None, :]), found, float("nan"))
    row = cosine + (batch * count + slot)[:, None] * num_rows
    tl.store(row + token[None, :], found, mask=(slot < count)[:, None] & (token < num_rows)[None, :])
    if tile == 0:
        is_dropped = are_in(token, kept, num_kept, BLOCK_N) == 0
        tl.store(dropped + batch * num_rows + token, is_dropped.to(tl.uint8), mask=token < num_rows)


@triton.jit
def finite_weights(weights, token, usable):
    """Return the weights of a tile of tokens, 0 for what isn't finite or usable."""
    weight = tl.load(weights + token, mask=usable, other=0.0)
    return tl.where(tl.abs(weight) < float("inf"), weight, 0.0)


@triton.jit(do_not_specialize=["num_rows", "num_kept", "first", "count", "most"])
def collect_kernel(
    features,
    weights,
    kept,
    cosine,
    nearest,
    dropped,
    output,
    stride_b,
    stride_n,
    num_rows,
    num_kept,
    first,
    count,
    most,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Collect for one token and a tile of channels: output [B, K + 1, C]. Grid (channel tiles, count, B), or count + 1.

    Program ``num_kept - first`` adds up what is dropped. ``nearest`` is [B * count, most] int64.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    features += batch * stride_b
    weights += batch * num_rows
    inside = channel < C
    total = tl.zeros((BLOCK_C,), tl.float32)
    if first + slot < num_kept:
        own = tl.load(kept + batch * num_kept + first + slot)
        row = batch * count + slot
        for start in range(0, most, BLOCK_N):
            entry = start + tl.arange(0, BLOCK_N)
            token = tl.load(nearest + row * most + entry, mask=entry < most, other=-1)
            found = tl.load(cosine + row * num_rows + token, mask=token >= 0, other=float("nan"))
            near = (token >= 0) & (found == found)
            weight = finite_weights(weights, token, near)
            values = tl.load(
                features + token[:, None] * stride_n + channel[None, :],
                mask=near[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(values.to(tl.float32) * weight[:, None], 0)
        # As in `greedy`: a scalar condition moves the bound.
        mine = tl.load(
            features + own * stride_n + channel, mask=channel < tl.where(own >= 0, C, 0), other=0.0
        )
        total = tl.where(own >= 0, total + mine.to(tl.float32), 0.0)
    else:
        for start in range(0, num_rows, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            gone = tl.load(dropped + batch * num_rows + token, mask=token < num_rows, other=0) != 0
            weight = finite_weights(weights, token, gone)
            values = tl.load(
                features + token.to(tl.int64)[:, None] * stride_n + channel[None, :],
                mask=gone[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(values.to(tl.float32) * weight[:, None], 0)
    tl.store(output + (batch * (num_kept + 1) + first + slot) * C + channel, total, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_targets", "num_excluded"])
def assign_kernel(
    keys,
    targets,
    excluded,
    goes_to,
    stride_b,
    stride_n,
    num_rows,
    num_targets,
    num_excluded,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Find the target of a tile of tokens: goes_to [B, N] int32, -1 for targets and what is excluded.

    Grid (B * token tiles).
    """
    token_tiles = tl.cdiv(num_rows, BLOCK_M)
    batch = (tl.program_id(0) // token_tiles).to(tl.int64)
    token = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    keys += batch * stride_b
    targets += batch * num_targets
    pointer = keys + token.to(tl.int64) * stride_n
    highest = tl.full((BLOCK_M,), NO_TARGET - 1.0, tl.float32)
    best = tl.full((BLOCK_M,), -1, tl.int32)
    stays = token >= num_rows
    for start in range(0, num_targets, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        target = tl.load(targets + slot, mask=slot < num_targets, other=-1)
        real = target >= 0
        found = cosines(
            pointer, token < num_rows, keys + target * stride_n, real, BLOCK_M, BLOCK_N, E, BLOCK_E, UPCAST
        )
        found = tl.where(found == found, found, NAN_COSINE)
        found = tl.where(real[None, :], found, NO_TARGET)
        largest = tl.max(found, 1)
        first = tl.min(tl.where(found == largest[:, None], slot[None, :], num_targets), 1)
        best = tl.where(largest > highest, first.to(tl.int32), best)
        highest = tl.maximum(highest, largest)
        stays |= tl.max((token[:, None] == target[None, :]).to(tl.int32), 1) > 0
    if excluded is not None:
        stays |= are_in(token, excluded + batch * num_excluded, num_excluded, BLOCK_M)
    tl.store(goes_to + batch * num_rows + token, tl.where(stays, -1, best), mask=token < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_targets"])
def merge_kernel(
    features,
    targets,
    goes_to,
    output,
    stride_b,
    stride_n,
    num_rows,
    num_targets,
    C: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Merge into a tile of targets and channels: output [B, M, C]. Grid (B * target tiles * channel tiles)."""
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    target_tiles = tl.cdiv(num_targets, BLOCK_M)
    channel = tl.program_id(0) % channel_tiles * BLOCK_C
    tile = tl.program_id(0) // channel_tiles % target_tiles
    batch = (tl.program_id(0) // channel_tiles // target_tiles).to(tl.int64)
    slot = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets + batch * num_targets + slot, mask=slot < num_targets, other=-1)
    features += batch * stride_b
    goes_to += batch * num_rows
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    number = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, num_rows, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        to = tl.load(goes_to + token, mask=token < num_rows, other=-1)
        weight = (to[None, :] == slot[:, None]).to(tl.float32)
        number += tl.sum(weight, 1)
        values = load_vectors(
            features + token.to(tl.int64) * stride_n, token < num_rows, channel, C, BLOCK_C, UPCAST
        )
        total = tl.dot(weight.to(values.dtype), values, total, input_precision="ieee")
    own = load_vectors(features + target * stride_n, target >= 0, channel, C, BLOCK_C, UPCAST).to(tl.float32)
    if AVERAGE:
        total += own
        number += 1.0
    merged = total / tl.maximum(number, 1.0)[:, None]
    if not AVERAGE:
        merged += own
    merged = tl.where((target >= 0)[:, None], merged, 0.0)
    c = channel + tl.arange(0, BLOCK_C)
    place = (batch * num_targets + slot)[:, None] * C + c[None, :]
    tl.store(output + place, merged, mask=(slot < num_targets)[:, None] & (c < C)[None, :])


def collect_nearest(features: Tensor, keys: Tensor, weights: Tensor, kept: Tensor, count: int) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, num_rows, channels = features.shape
    num_kept, most = kept.shape[1], min(count, num_rows - 1)
    features, keys = with_whole_rows(features), with_whole_rows(keys)
    weights, kept = weights.contiguous(), kept.contiguous()
    output = torch.empty((batch, num_kept + 1, channels), dtype=features.dtype, device=features.device)
    dropped = torch.empty((batch, num_rows), dtype=torch.uint8, device=features.device)
    channel_block = min(next_power_of_2(channels), tiles.COLLECT.part)
    for block in row_blocks(num_kept, batch * num_rows):
        first = block.start
        number = min(block.stop, num_kept) - first
        cosine = torch.empty((batch, number, num_rows), dtype=torch.float32, device=features.device)
        launch_cosines(keys, kept, block, cosine, dropped)
        nearest = select.topk_indices(cosine.flatten(0, 1), most, None, most)
        launch(
            collect_kernel,
            (cdiv(channels, channel_block), number + (first + number == num_kept), batch),
            (features, weights, kept, cosine, nearest, dropped, output),
            features.stride()[:2],
            (num_rows, num_kept, first, number, most),
            (),
            {"C": channels, "BLOCK_N": tiles.COLLECT.columns, "BLOCK_C": channel_block},
            **tiles.COLLECT.options(),
        )
    return output


def merge_nearest(
    features: Tensor, keys: Tensor, targets: Tensor, excluded: Tensor | None, average: bool
) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, num_rows, channels = features.shape
    num_targets = targets.shape[1]
    features, keys, targets = with_whole_rows(features), with_whole_rows(keys), targets.contiguous()
    excluded = None if excluded is None else excluded.contiguous()
    output = torch.empty((batch, num_targets, channels), dtype=features.dtype, device=features.device)
    goes_to = torch.empty((batch, num_rows), dtype=torch.int32, device=features.device)
    of_cosines, of_features = tiles.spatial_weights(keys.dtype), tiles.spatial_aggregate(features.dtype)
    channel_block = part_of(channels, of_features.part)
    launch(
        assign_kernel,
        (batch * cdiv(num_rows, of_cosines.rows),),
        (keys, targets, excluded, goes_to),
        keys.stride()[:2],
        (num_rows, num_targets, 0 if excluded is None else excluded.shape[1]),
        (),
        _of_keys(keys, of_cosines),
        **of_cosines.options(),
    )
    launch(
        merge_kernel,
        (batch * cdiv(num_targets, of_features.rows) * cdiv(channels, channel_block),),
        (features, targets, goes_to, output),
        features.stride()[:2],
        (num_rows, num_targets),
        (),
        {
            "C": channels,
            "AVERAGE": average,
            "BLOCK_M": of_features.rows,
            "BLOCK_N": of_features.columns,
            "BLOCK_C": channel_block,
            "UPCAST": triton_is_interpreted(),
        },
        **of_features.options(),
    )
    return output


def launch_cosines(keys: Tensor, kept: Tensor, block: slice, cosine: Tensor, dropped: Tensor) -> None:
    """Launch ``cosines_kernel`` for a block of the kept tokens [B, K]: cosine [B, n, N] float32, dropped [B, N] uint8."""
    batch, num_rows, _ = keys.shape
    number, chosen = cosine.shape[1], tiles.spatial_weights(keys.dtype)
    launch(
        cosines_kernel,
        (batch * max(cdiv(number, chosen.rows), 1) * cdiv(num_rows, chosen.columns),),
        (keys, kept, cosine, dropped),
        keys.stride()[:2],
        (num_rows, kept.shape[1], block.start, number),
        (),
        _of_keys(keys, chosen),
        **chosen.options(),
    )


def _of_keys(keys: Tensor, chosen: tiles.Tiles) -> dict[str, int]:
    """Return the constants of a kernel that compares keys."""
    length = keys.shape[2]
    return {
        "E": length,
        "BLOCK_M": chosen.rows,
        "BLOCK_N": chosen.columns,
        "BLOCK_E": part_of(length, chosen.part),
        "UPCAST": triton_is_interpreted(),
    }
