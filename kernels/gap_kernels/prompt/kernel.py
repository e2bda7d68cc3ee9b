# mypy: disable-error-code="no-untyped-def"
"""Reading a prompt in Triton: one program per sample scans its rows twice, as the text begins behind the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

BLOCK = 1024
MOST_PLACEHOLDERS = 4


@triton.jit
def flags_at(mask, sample, row, inside, stride_b, stride_q):
    """Return whether a mask of any dtype isn't 0 at rows of one sample; False outside."""
    value = tl.load(mask + sample * stride_b + row * stride_q, mask=inside, other=0)
    return inside & (value != 0)


@triton.jit
def sources_of(index, sample, slot, num_rows):
    """Return the rows of the prompt that slots of one sample stand for, and which of them are no filler."""
    inside = slot < num_rows
    source = slot.to(tl.int64)
    if index is not None:
        source = tl.load(index + sample * num_rows + slot, mask=inside, other=-1)
        inside = source >= 0
    return source, inside


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(
    do_not_specialize=[
        "num_rows", "num_visual", "num_text", "tokens_stride_b", "tokens_stride_q", "mask_stride_b", "mask_stride_q",
        "answer_stride_b", "answer_stride_q", "rankers_stride_b", "rankers_stride_q", "id_0", "id_1", "id_2", "id_3",
    ]
)  # fmt: skip
def read_prompt_kernel(
    tokens,
    mask,
    answer,
    rankers,
    index,
    visual,
    real,
    text,
    visual_index,
    text_rows,
    last_row,
    counts,
    num_rows,
    num_visual,
    num_text,
    tokens_stride_b,
    tokens_stride_q,
    mask_stride_b,
    mask_stride_q,
    answer_stride_b,
    answer_stride_q,
    rankers_stride_b,
    rankers_stride_q,
    id_0,
    id_1,
    id_2,
    id_3,
    BY_ID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read one sample: tokens [B, Q] -> visual, real, text [B, S], visual_index [B, V], text_rows [B, R], counts [5, B].

    Masks without values are None, and so is ``index`` [B, S] where S = Q. Ids are distinct, -1 where there are fewer.
    """
    sample = tl.program_id(0).to(tl.int64)
    batch = tl.num_programs(0)
    visual_count = tl.full((), 0, tl.int32)
    real_count = tl.full((), 0, tl.int32)
    last_visual = tl.full((), -1, tl.int32)
    last_query = tl.full((), 0, tl.int32)
    ends_in_image = tl.full((), 0, tl.int32)
    last_is_real = tl.full((), 0, tl.int32)
    for start in range(0, num_rows, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        source, inside = sources_of(index, sample, slot, num_rows)
        is_real = inside
        if mask is not None:
            is_real = flags_at(mask, sample, source, inside, mask_stride_b, mask_stride_q)
        token = tl.load(tokens + sample * tokens_stride_b + source * tokens_stride_q, mask=is_real, other=0)
        named = (token == id_0) | (token == id_1) | (token == id_2) | (token == id_3) if BY_ID else token != 0
        is_visual = is_real & named
        is_query = is_real
        ends = is_visual & (slot == num_rows - 1)
        if answer is not None:
            is_query = is_real & ~flags_at(answer, sample, source, inside, answer_stride_b, answer_stride_q)
            following, follows = sources_of(index, sample, slot + 1, num_rows)
            answered = flags_at(answer, sample, following, follows, answer_stride_b, answer_stride_q)
            ends = ends | (is_visual & answered)
        written = slot < num_rows
        tl.store(visual + sample * num_rows + slot, is_visual.to(tl.uint8), mask=written)
        tl.store(real + sample * num_rows + slot, is_real.to(tl.uint8), mask=written)
        column = visual_count + tl.cumsum(is_visual.to(tl.int32), 0) - 1
        target = visual_index + sample * num_visual + column
        tl.store(target, slot.to(tl.int64), mask=is_visual & (column < num_visual))
        visual_count += tl.sum(is_visual.to(tl.int32), 0)
        real_count += tl.sum(is_real.to(tl.int32), 0)
        last_visual = tl.maximum(last_visual, tl.max(tl.where(is_visual, slot, -1), 0))
        last_query = tl.maximum(last_query, tl.max(tl.where(is_query, slot, 0), 0))
        ends_in_image = tl.maximum(ends_in_image, tl.max(ends.to(tl.int32), 0))
        at_end = is_real & (slot == num_rows - 1)
        last_is_real = tl.maximum(last_is_real, tl.max(at_end.to(tl.int32), 0))
    text_count = tl.full((), 0, tl.int32)
    for start in range(0, num_rows, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        source, inside = sources_of(index, sample, slot, num_rows)
        is_text = inside
        if mask is not None:
            is_text = flags_at(mask, sample, source, inside, mask_stride_b, mask_stride_q)
        if rankers is not None:
            is_text = is_text & flags_at(rankers, sample, source, inside, rankers_stride_b, rankers_stride_q)
        else:
            is_text = is_text & (slot > last_visual)
            if answer is not None:
                is_text = is_text & ~flags_at(
                    answer, sample, source, inside, answer_stride_b, answer_stride_q
                )
        tl.store(text + sample * num_rows + slot, is_text.to(tl.uint8), mask=slot < num_rows)
        column = text_count + tl.cumsum(is_text.to(tl.int32), 0) - 1
        target = text_rows + sample * num_text + column
        tl.store(target, slot.to(tl.int64), mask=is_text & (column < num_text))
        text_count += tl.sum(is_text.to(tl.int32), 0)
    # The columns behind the counts, which no scan wrote.
    for start in range(0, num_visual, BLOCK):
        column = start + tl.arange(0, BLOCK)
        filler = tl.full((BLOCK,), -1, tl.int64)
        tl.store(
            visual_index + sample * num_visual + column,
            filler,
            mask=(column >= visual_count) & (column < num_visual),
        )
    for start in range(0, num_text, BLOCK):
        column = start + tl.arange(0, BLOCK)
        filler = tl.where(column == 0, last_query, -1).to(tl.int64)
        tl.store(
            text_rows + sample * num_text + column, filler, mask=(column >= text_count) & (column < num_text)
        )
    tl.store(last_row + sample, last_query.to(tl.int64))
    tl.store(counts + sample, visual_count.to(tl.int64))
    tl.store(counts + batch + sample, real_count.to(tl.int64))
    tl.store(counts + 2 * batch + sample, text_count.to(tl.int64))
    tl.store(counts + 3 * batch + sample, ends_in_image.to(tl.int64))
    tl.store(counts + 4 * batch + sample, last_is_real.to(tl.int64))


def read_prompt(
    tokens: Tensor,
    placeholders: Sequence[int],
    attention_mask: Tensor | None,
    answer: Tensor | None,
    rankers: Tensor | None,
    index: Tensor | None,
    num_visual: int,
    num_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the scan; arguments and result as in ``reference.py``."""
    batch, num_rows = tokens.shape if index is None else index.shape

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    visual, real, text = (new(batch, num_rows, dtype=torch.bool) for _ in range(3))
    outputs = (
        visual, real, text, new(batch, num_visual), new(batch, num_text), new(batch, 1), new(5, batch),
    )  # fmt: skip
    masks = [tokens, attention_mask, answer, rankers]
    strides = [stride for each in masks for stride in ((0, 0) if each is None else each.stride())]
    ids = [*sorted(set(placeholders)), *[-1] * MOST_PLACEHOLDERS][:MOST_PLACEHOLDERS]
    if batch:
        launch(
            read_prompt_kernel,
            (batch,),
            (
                *(None if each is None else _bytes(each) for each in masks),
                None if index is None else index.contiguous(),
                *map(_bytes, outputs),
            ),
            (),
            (num_rows, num_visual, num_text, *strides, *ids),
            (),
            {"BY_ID": tokens.dtype != torch.bool, "BLOCK": BLOCK},
            num_warps=4,
        )  # fmt: skip
    return outputs


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
