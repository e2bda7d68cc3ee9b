# mypy: disable-error-code="no-untyped-def"
"""Turning queries and keys back in Triton: one launch for both.

A program takes a tile of rows of one head. Its channels are read twice, for themselves and for the other one of their pair:
then they come from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2

TILE = 1024
"""Rows times channels of a program."""


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["num_rows"])
def unrotate_kernel(
    query,
    key,
    cos,
    sin,
    pairs,
    query_out,
    key_out,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    key_stride_d,
    cos_stride_a,
    cos_stride_b,
    cos_stride_s,
    cos_stride_f,
    sin_stride_a,
    sin_stride_b,
    sin_stride_s,
    sin_stride_f,
    num_rows,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    AXES: tl.constexpr,
    F: tl.constexpr,
    RESCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a tile of rows of one head of ``query_out`` or ``key_out`` [B, H, S, D]. Grid (row tiles, Hq + Hkv, B)."""
    sample, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_D)
    real = (row < num_rows)[:, None] & (channel < D)[None, :]
    other = tl.load(pairs + channel, mask=channel < D, other=0)
    column = tl.load(pairs + D + channel, mask=channel < D, other=-1)
    turned = (column >= 0) & (column < AXES * F) & (other >= 0) & (other < D)
    column = tl.where(turned, column, 0)
    other = tl.where(turned, other, 0)
    place = row.to(tl.int64)[:, None]
    axis, column = (column // F).to(tl.int64)[None, :], (column % F)[None, :]
    uses = real & turned[None, :]
    cos += sample * cos_stride_b + axis * cos_stride_a + place * cos_stride_s + column * cos_stride_f
    sin += sample * sin_stride_b + axis * sin_stride_a + place * sin_stride_s + column * sin_stride_f
    c = tl.load(cos, mask=uses, other=1.0).to(tl.float32)
    s = tl.load(sin, mask=uses, other=0.0).to(tl.float32)
    if RESCALE:
        length = c * c + s * s
        c /= length
        s /= length
    # Backwards: the first of a pair gets its other one's share with a plus.
    s = tl.where((other > channel)[None, :], s, -s)
    if head < HEADS:
        source = query + sample * query_stride_b + head * query_stride_h + place * query_stride_s
        own = tl.load(source + channel[None, :] * query_stride_d, mask=real, other=0.0).to(tl.float32)
        beside = tl.load(source + other[None, :] * query_stride_d, mask=uses, other=0.0).to(tl.float32)
        target = query_out + ((sample * HEADS + head) * num_rows + place) * D + channel[None, :]
        tl.store(target, own * c + beside * s, mask=real)
    else:
        head -= HEADS
        source = key + sample * key_stride_b + head * key_stride_h + place * key_stride_s
        own = tl.load(source + channel[None, :] * key_stride_d, mask=real, other=0.0).to(tl.float32)
        beside = tl.load(source + other[None, :] * key_stride_d, mask=uses, other=0.0).to(tl.float32)
        target = key_out + ((sample * KEY_HEADS + head) * num_rows + place) * D + channel[None, :]
        tl.store(target, own * c + beside * s, mask=real)


def unrotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor, rescale: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, heads, num_rows, head_dim = query.shape
    key_heads = key.shape[1]
    outputs = (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
    )
    block_d = next_power_of_2(head_dim)
    block = max(1, TILE // block_d)
    strides = []
    for each in (cos, sin):
        axis, sample, row, column = each.stride() if each.dim() == 4 else (0, *each.stride())
        strides += [axis, sample if each.shape[-3] > 1 else 0, row, column]
    launch(
        unrotate_kernel,
        (cdiv(num_rows, block), heads + key_heads, batch),
        (query, key, cos, sin, pairs.contiguous(), *outputs),
        (*query.stride(), *key.stride(), *strides),
        (num_rows,),
        (),
        {
            "HEADS": heads,
            "KEY_HEADS": key_heads,
            "D": head_dim,
            "AXES": cos.shape[0] if cos.dim() == 4 else 1,
            "F": cos.shape[-1],
            "RESCALE": rescale,
            "BLOCK": block,
            "BLOCK_D": block_d,
        },
        num_warps=4,
    )
    return outputs
