# mypy: disable-error-code="no-untyped-def"
"""The cosine to the text in Triton: no embedding is copied.

1. ``text_sum_kernel``: a tile of channels of the sum over the text, whose direction is that of the mean;
2. ``text_cosine_kernel``: a tile of visual tokens against it.

Each embedding is read once, and sums have a fixed order: runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aggregate.kernel import inverse_norms
from ..launch import cdiv, launch

ROW_BLOCK = 16
CHANNEL_BLOCK = 128


@triton.jit
def load_rows(
    embeds, rows, length, start, channels, stride_q, first, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return columns of ``rows`` [length], which of them are no filler, and a tile of their embeddings in float32."""
    column = start + tl.arange(0, BLOCK)
    row = tl.load(rows + column, mask=column < length, other=-1)
    channel = first + tl.arange(0, BLOCK_C)
    values = tl.load(
        embeds + row[:, None] * stride_q + channel[None, :],
        mask=(row >= 0)[:, None] & (channel < channels)[None, :],
        other=0.0,
    )
    return column, row >= 0, values.to(tl.float32)


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["num_text"])
def text_sum_kernel(
    embeds,
    text_rows,
    direction,
    stride_b,
    stride_q,
    channels,
    num_text,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add up a tile of channels over the text: direction [B, C] float32. Grid (channel tiles, B)."""
    first, sample = tl.program_id(0) * BLOCK_C, tl.program_id(1).to(tl.int64)
    embeds += sample * stride_b
    text_rows += sample * num_text
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, num_text, BLOCK):
        _, _, values = load_rows(
            embeds, text_rows, num_text, start, channels, stride_q, first, BLOCK, BLOCK_C
        )
        total += tl.sum(values, 0)
    channel = first + tl.arange(0, BLOCK_C)
    tl.store(direction + sample * channels + channel, total, mask=channel < channels)


@triton.jit(do_not_specialize=["num_visual"])
def text_cosine_kernel(
    embeds,
    visual_index,
    direction,
    scores,
    stride_b,
    stride_q,
    channels,
    num_visual,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compare a tile of visual tokens: scores [B, V] float32. Grid (token tiles, B)."""
    start, sample = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    embeds += sample * stride_b
    visual_index += sample * num_visual
    products = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    text_squares = tl.zeros((BLOCK_C,), tl.float32)
    column = start + tl.arange(0, BLOCK)
    real = column < 0
    for first in range(0, channels, BLOCK_C):
        column, real, values = load_rows(
            embeds, visual_index, num_visual, start, channels, stride_q, first, BLOCK, BLOCK_C
        )
        channel = first + tl.arange(0, BLOCK_C)
        text = tl.load(direction + sample * channels + channel, mask=channel < channels, other=0.0)
        products += values * text[None, :]
        squares += values * values
        text_squares += text * text
    cosine = tl.sum(products, 1) * inverse_norms(tl.sum(squares, 1)) * inverse_norms(tl.sum(text_squares, 0))
    tl.store(scores + sample * num_visual + column, tl.where(real, cosine, 0.0), mask=column < num_visual)


def text_cosine(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> Tensor:
    """Launch the two kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, channels = embeds.shape[0], embeds.shape[2]
    num_visual, num_text = visual_index.shape[1], text_rows.shape[1]
    if not visual_index.numel() or not channels:
        return torch.zeros(visual_index.shape, dtype=torch.float32, device=embeds.device)
    scores = torch.empty(visual_index.shape, dtype=torch.float32, device=embeds.device)
    embeds = embeds if embeds.stride(-1) == 1 else embeds.contiguous()
    visual_index, text_rows = visual_index.contiguous(), text_rows.contiguous()
    direction = torch.empty((batch, channels), dtype=torch.float32, device=embeds.device)
    sizes = (*embeds.stride()[:2], channels)
    blocks = {"BLOCK": ROW_BLOCK, "BLOCK_C": CHANNEL_BLOCK}
    launch(
        text_sum_kernel,
        (cdiv(channels, CHANNEL_BLOCK), batch),
        (embeds, text_rows, direction),
        sizes,
        (num_text,),
        (),
        blocks,
        num_warps=4,
    )
    launch(
        text_cosine_kernel,
        (cdiv(num_visual, ROW_BLOCK), batch),
        (embeds, visual_index, direction, scores),
        sizes,
        (num_visual,),
        (),
        blocks,
        num_warps=4,
    )
    return scores
