# mypy: disable-error-code="no-untyped-def"
"""SparseVLM's raters in Triton: no product of a visual and a text token is stored.

1. ``text_share_kernel``: a tile of visual tokens goes over the text twice: for the sums of its softmax, and for what each
   text token gets of it;
2. ``text_rater_kernel``: one program per sample adds the tiles, in a fixed order, and compares with the mean.

Runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_is_interpreted
from ..importance.kernel import part_of
from ..launch import cdiv, launch

RATER_BLOCK = 128


@triton.jit
def products(
    embeds, patch, is_patch, word, is_word, stride_q, channels, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr
):
    """Return the products [patches, words] of two tiles of rows of one sample, in float32."""
    total = tl.zeros((patch.shape[0], word.shape[0]), tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = channel < channels
        left = tl.load(
            embeds + patch[:, None] * stride_q + channel[None, :],
            mask=is_patch[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            embeds + word[None, :] * stride_q + channel[:, None],
            mask=is_word[None, :] & inside[:, None],
            other=0.0,
        )
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    return tl.where(is_word[None, :], total, float("-inf"))


@triton.jit
def words_of(text_rows, sample, start, num_text, BLOCK_T: tl.constexpr):
    """Return columns of ``text_rows``, the rows that they hold, and which of them are no filler."""
    column = start + tl.arange(0, BLOCK_T)
    word = tl.load(text_rows + sample * num_text + column, mask=column < num_text, other=-1)
    return column, word, word >= 0


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["num_visual", "num_text"])
def text_share_kernel(
    embeds,
    visual_index,
    text_rows,
    shares,
    stride_b,
    stride_q,
    channels,
    num_visual,
    num_text,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write what each text token gets of one tile of visual tokens: shares [B, tiles, R]. Grid (tiles, B)."""
    tile, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    embeds += sample * stride_b
    slot = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    patch = tl.load(visual_index + sample * num_visual + slot, mask=slot < num_visual, other=-1)
    is_patch = patch >= 0
    highest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, num_text, BLOCK_T):
        column, word, is_word = words_of(text_rows, sample, start, num_text, BLOCK_T)
        product = products(embeds, patch, is_patch, word, is_word, stride_q, channels, BLOCK_C, UPCAST)
        higher = tl.maximum(highest, tl.max(product, 1))
        # Where there has been no word yet, nothing is to be scaled.
        scale = tl.where(highest == float("-inf"), 0.0, tl.exp(highest - higher))
        weight = tl.where(is_word[None, :], tl.exp(product - higher[:, None]), 0.0)
        total = total * scale + tl.sum(weight, 1)
        highest = higher
    tiles = tl.num_programs(0)
    for start in range(0, num_text, BLOCK_T):
        column, word, is_word = words_of(text_rows, sample, start, num_text, BLOCK_T)
        product = products(embeds, patch, is_patch, word, is_word, stride_q, channels, BLOCK_C, UPCAST)
        weight = tl.exp(product - highest[:, None]) / total[:, None]
        share = tl.sum(tl.where(is_patch[:, None] & is_word[None, :], weight, 0.0), 0)
        tl.store(shares + (sample * tiles + tile) * num_text + column, share, mask=column < num_text)


@triton.jit
def relevance_of(shares, sample, tiles, column, num_text):
    """Return the sum of the tiles' shares at columns."""
    total = tl.zeros(column.shape, tl.float32)
    for tile in range(0, tiles):
        total += tl.load(
            shares + (sample * tiles + tile) * num_text + column, mask=column < num_text, other=0.0
        )
    return total


@triton.jit(do_not_specialize=["num_rows", "num_text", "tiles"])
def text_rater_kernel(shares, text_rows, found, num_rows, num_text, tiles, BLOCK: tl.constexpr):
    """Write which rows are raters, found [B, Q]. One program per sample."""
    sample = tl.program_id(0).to(tl.int64)
    found += sample * num_rows
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.store(found + row, tl.zeros((BLOCK,), tl.uint8), mask=row < num_rows)
    total = tl.zeros((), tl.float32)
    count = tl.zeros((), tl.int32)
    for start in range(0, num_text, BLOCK):
        column, word, is_word = words_of(text_rows, sample, start, num_text, BLOCK)
        relevance = relevance_of(shares, sample, tiles, column, num_text)
        total += tl.sum(tl.where(is_word, relevance, 0.0), 0)
        count += tl.sum(is_word.to(tl.int32), 0)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    reached = tl.zeros((), tl.int32)
    for start in range(0, num_text, BLOCK):
        column, word, is_word = words_of(text_rows, sample, start, num_text, BLOCK)
        relevance = relevance_of(shares, sample, tiles, column, num_text)
        reached += tl.sum((is_word & (relevance >= mean)).to(tl.int32), 0)
    # Where none reaches the mean, all rate: from column 0 on. A block and a scalar condition make no mask in the interpreter
    # of Triton 3.9.
    first_of_all = tl.where(reached == 0, 0, num_text)
    tl.debug_barrier()  # other threads of this program have written the zeros
    for start in range(0, num_text, BLOCK):
        column, word, is_word = words_of(text_rows, sample, start, num_text, BLOCK)
        relevance = relevance_of(shares, sample, tiles, column, num_text)
        rates = is_word & ((relevance >= mean) | (column >= first_of_all))
        tl.store(found + word, tl.full((BLOCK,), 1, tl.uint8), mask=rates)


def text_raters(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> Tensor:
    """Launch the two kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, num_rows, channels = embeds.shape
    num_visual, num_text = visual_index.shape[1], text_rows.shape[1]
    found = torch.empty((batch, num_rows), dtype=torch.bool, device=embeds.device)
    if found.numel() == 0:
        return found
    embeds = embeds if embeds.stride(-1) == 1 else embeds.contiguous()
    visual_index, text_rows = visual_index.contiguous(), text_rows.contiguous()
    exact = embeds.dtype == torch.float32
    block = 16 if exact else 32
    tiles = cdiv(num_visual, block)
    shares = torch.empty((batch, tiles, num_text), dtype=torch.float32, device=embeds.device)
    if shares.numel():
        launch(
            text_share_kernel,
            (tiles, batch),
            (embeds, visual_index, text_rows, shares),
            (*embeds.stride()[:2], channels),
            (num_visual, num_text),
            (),
            {
                "BLOCK_V": block,
                "BLOCK_T": block,
                "BLOCK_C": part_of(channels, 32 if exact else 64),
                "UPCAST": triton_is_interpreted(),
            },
            num_warps=4,
        )
    launch(
        text_rater_kernel,
        (batch,),
        (shares, text_rows, found.view(torch.uint8)),
        (),
        (num_rows, num_text, tiles),
        (),
        {"BLOCK": RATER_BLOCK},
        num_warps=4,
    )
    return found
