# mypy: disable-error-code="no-untyped-def"
"""Putting rows among others in Triton, in one launch.

A program looks for a tile of the result's rows in the index, and copies what it finds, or what the result has otherwise. So
each row is written once, and nothing has to be cleared before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from ..prune.kernel import with_whole_rows

ROWS = 4
PLACES = 64
"""Of the index, how many entries are compared with a tile of rows at a time."""
COPY_BYTES = 4096
"""Of each row, what a program holds at a time."""


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["num_rows", "length", "num_among"])
def scatter_rows_kernel(
    values,
    index,
    among,
    base,
    output,
    values_stride_b,
    values_stride_l,
    base_stride_b,
    base_stride_q,
    channels,
    num_rows,
    length,
    num_among,
    BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write a tile of rows: output [B, Q, C]. Grid (row tiles, B)."""
    sample = tl.program_id(1).to(tl.int64)
    target = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index += sample * length
    source = tl.full((BLOCK,), -1, tl.int32)
    for start in range(0, length, BLOCK_L):
        slot = start + tl.arange(0, BLOCK_L)
        place = tl.load(index + slot, mask=slot < length, other=-1)
        if among is not None:
            inside = (place >= 0) & (place < num_among)
            place = tl.load(among + sample * num_among + place, mask=inside, other=-1)
        found = tl.where(target[:, None] == place[None, :], slot[None, :], -1)
        source = tl.maximum(source, tl.max(found, 1))
    inside = (target < num_rows)[:, None]
    is_put = (source >= 0)[:, None]
    values += sample * values_stride_b + source.to(tl.int64)[:, None] * values_stride_l
    output += (sample * num_rows + target)[:, None] * channels
    if base is not None:
        base += sample * base_stride_b + target.to(tl.int64)[:, None] * base_stride_q
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)[None, :]
        value = tl.load(values + channel, mask=is_put & inside & (channel < channels), other=0.0)
        if base is not None:
            other = tl.load(
                base + channel, mask=(source < 0)[:, None] & inside & (channel < channels), other=0.0
            )
            value = tl.where(is_put, value, other)
        tl.store(output + channel, value, mask=inside & (channel < channels))


def scatter_rows(
    values: Tensor, index: Tensor, num_rows: int, among: Tensor | None, base: Tensor | None
) -> Tensor:
    """Launch the kernel; arguments and result as in ``reference.py``."""
    batch, length, channels = values.shape
    output = torch.empty((batch, num_rows, channels), dtype=values.dtype, device=values.device)
    if not output.numel():
        return output
    values = with_whole_rows(values)
    base = None if base is None else with_whole_rows(base)
    among = None if among is None else among.contiguous()
    launch(
        scatter_rows_kernel,
        (cdiv(num_rows, ROWS), batch),
        (values, index.contiguous(), among, base, output),
        (*values.stride()[:2], *((0, 0) if base is None else base.stride()[:2]), channels),
        (num_rows, length, 0 if among is None else among.shape[1]),
        (),
        {
            "BLOCK": ROWS,
            "BLOCK_L": PLACES,
            "BLOCK_C": min(next_power_of_2(channels), COPY_BYTES // values.element_size()),
        },
        num_warps=8,
    )
    return output
