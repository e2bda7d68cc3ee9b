# mypy: disable-error-code="no-untyped-def"
"""Row selection and gather in Triton: one program per sample selects, one program per output row copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from ..select.kernel import MAX_REGISTERS, select_threshold, tile_options, write_selected
from .coverage import STRIDE_SHARE, Covering
from .keys import select_by_stride, write_keys_by_region, write_row_keys, write_score_keys

FILL_BLOCK = 1024
COPY_BYTES = 128
"""Of the rows that a program copies, what one thread has in registers at a time."""
WARPS = 4


@triton.jit
def select_survivors(
    scores,
    visual_index,
    counts,
    mask,
    neighbours,
    order,
    keys,
    spare,
    index,
    sample,
    keep,
    num_visual,
    num_rows,
    length,
    mask_stride_b,
    mask_stride_q,
    neighbours_stride_b,
    order_stride_b,
    per_region,
    share,
    of_shares,
    COVERAGE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_FILL: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Write the survivors of one sample: scores, visual_index [B, V] -> index [B, length].

    Every row of the prompt gets a key in ``keys`` [B, Q], a workspace; ``spare`` is one, too, [B, Q] for the coverage
    ``"stride"``, and [B, V] for ``"region"`` with a mask. In row order, ties go to the lower position by themselves.
    """
    scores += sample * num_visual
    visual_index += sample * num_visual
    keys += sample * num_rows
    if mask is not None:
        mask += sample * mask_stride_b
    write_row_keys(keys, mask, num_rows, mask_stride_q, BLOCK_FILL)
    if COVERAGE == "topk":
        write_score_keys(scores, visual_index, keys, mask, num_visual, num_rows, mask_stride_q, BLOCK_FILL)
    if counts is not None:
        keep = tl.load(counts + sample)
    budget = tl.minimum(keep, num_visual).to(tl.int32)
    if COVERAGE == "region":
        if mask is not None:
            spare += sample * num_visual
        budget = write_keys_by_region(
            scores, visual_index, neighbours + sample * neighbours_stride_b, keys, spare, mask,
            per_region, budget, num_visual, num_rows, NEIGHBOURS, BLOCK_FILL,
        )  # fmt: skip
    if COVERAGE == "stride":
        threshold, ties, tied, total = select_by_stride(
            scores, visual_index, order + sample * order_stride_b, keys, spare + sample * num_rows,
            budget, share, of_shares, num_visual, num_rows, BLOCK, BLOCK_FILL, RESIDENT,
        )  # fmt: skip
    else:
        threshold, ties, tied, total = select_threshold(keys, num_rows, budget, BLOCK, RESIDENT, False)
    # The last row comes last among its ties; where it isn't selected it is one survivor more.
    last = tl.load(keys + num_rows - 1)
    selected = (last > threshold) | ((last == threshold) & (tied <= ties))
    total += tl.where(selected, 0, 1)
    write_selected(
        index + sample * length, keys, num_rows, length, threshold, ties, total, BLOCK_FILL, False, True
    )


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(
    do_not_specialize=[
        "keep", "num_visual", "num_rows", "length", "mask_stride_b", "mask_stride_q", "neighbours_stride_b",
        "order_stride_b", "per_region", "share", "of_shares",
    ]
)  # fmt: skip
def surviving_rows_kernel(
    scores,
    visual_index,
    counts,
    mask,
    neighbours,
    order,
    keys,
    spare,
    index,
    keep,
    num_visual,
    num_rows,
    length,
    mask_stride_b,
    mask_stride_q,
    neighbours_stride_b,
    order_stride_b,
    per_region,
    share,
    of_shares,
    COVERAGE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_FILL: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """One program per sample."""
    select_survivors(
        scores, visual_index, counts, mask, neighbours, order, keys, spare, index, tl.program_id(0).to(tl.int64),
        keep, num_visual, num_rows, length, mask_stride_b, mask_stride_q, neighbours_stride_b, order_stride_b,
        per_region, tl.cast(share, tl.int64), of_shares, COVERAGE, NEIGHBOURS, BLOCK, BLOCK_FILL, RESIDENT,
    )  # fmt: skip


@triton.jit
def copy_rows(
    hidden,
    cos,
    sin,
    ids,
    index,
    hidden_out,
    cos_out,
    sin_out,
    ids_out,
    sample,
    first,
    batch,
    hidden_stride_b,
    hidden_stride_q,
    cos_stride_b,
    cos_stride_q,
    sin_stride_b,
    sin_stride_q,
    channels,
    rotary,
    ids_stride_a,
    ids_stride_b,
    ids_stride_q,
    length,
    AXES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
):
    """Copy rows ``index[b, first..first + ROWS]`` of every input to the same rows of its output; filler (-1) copies row 0.

    Everything is loaded before anything is stored. As far as the compiler knows an output may be an input, so that it
    leaves a load behind a store where it is, and the latency of memory would be paid again and again. Only of a row
    longer than BLOCK_COPY the rest follows, a block at a time.
    """
    BLOCK_AXES: tl.constexpr = triton.next_power_of_2(AXES)
    j = first + tl.arange(0, ROWS)[:, None]
    target = sample * length + j
    real = j < length
    source = tl.zeros((ROWS, 1), tl.int64)
    for place in tl.static_range(ROWS):  # a tensor would be loaded by every layout that needs it
        row = tl.load(
            index + sample * length + first + place,
            mask=first + place < length,
            other=0,
            cache_modifier=".cg",
        )
        source = tl.where(j == first + place, tl.maximum(row, 0), source)
    hidden += sample * hidden_stride_b + source * hidden_stride_q
    hidden_out += target * channels
    c = tl.arange(0, BLOCK_COPY)[None, :]
    d = tl.arange(0, BLOCK_ROTARY)[None, :]
    axis = tl.arange(0, BLOCK_AXES)[None, :]
    row = tl.load(hidden + c, mask=real & (c < channels))
    cos_row = tl.load(cos + sample * cos_stride_b + source * cos_stride_q + d, mask=real & (d < rotary))
    sin_row = tl.load(sin + sample * sin_stride_b + source * sin_stride_q + d, mask=real & (d < rotary))
    position = ids + axis.to(tl.int64) * ids_stride_a + sample * ids_stride_b + source * ids_stride_q
    position = tl.load(position, mask=real & (axis < AXES))
    tl.store(hidden_out + c, row, mask=real & (c < channels))
    tl.store(cos_out + target * rotary + d, cos_row, mask=real & (d < rotary))
    tl.store(sin_out + target * rotary + d, sin_row, mask=real & (d < rotary))
    tl.store(ids_out + axis * batch * length + target, position, mask=real & (axis < AXES))
    for copy in tl.static_range(1, COPIES):
        c = copy * BLOCK_COPY + tl.arange(0, BLOCK_COPY)[None, :]
        row = tl.load(hidden + c, mask=real & (c < channels))
        tl.store(hidden_out + c, row, mask=real & (c < channels))


@triton.jit(do_not_specialize=["ids_stride_a", "ids_stride_b", "ids_stride_q", "length"])
def gather_rows_kernel(
    hidden,
    cos,
    sin,
    ids,
    index,
    hidden_out,
    cos_out,
    sin_out,
    ids_out,
    hidden_stride_b,
    hidden_stride_q,
    cos_stride_b,
    cos_stride_q,
    sin_stride_b,
    sin_stride_q,
    channels,
    rotary,
    ids_stride_a,
    ids_stride_b,
    ids_stride_q,
    length,
    AXES: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
):
    """One program per row and sample: grid (L, B)."""
    copy_rows(
        hidden, cos, sin, ids, index, hidden_out, cos_out, sin_out, ids_out,
        tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(1).to(tl.int64),
        hidden_stride_b, hidden_stride_q, cos_stride_b, cos_stride_q, sin_stride_b, sin_stride_q,
        channels, rotary, ids_stride_a, ids_stride_b, ids_stride_q, length,
        AXES, 1, BLOCK_COPY, COPIES, BLOCK_ROTARY,
    )  # fmt: skip


def surviving_rows(
    scores: Tensor,
    visual_index: Tensor,
    keep: int,
    counts: Tensor | None,
    attention_mask: Tensor | None,
    num_rows: int,
    length: int,
    coverage: str = "topk",
    neighbours: Tensor | None = None,
    per_region: int = 0,
    order: Tensor | None = None,
    share: int = STRIDE_SHARE.numerator,
    of_shares: int = STRIDE_SHARE.denominator,
) -> Tensor:
    """Launch the selection; arguments and result as in ``reference.py``."""
    batch, num_visual = visual_index.shape
    device = scores.device
    index = torch.empty((batch, length), dtype=torch.int64, device=device)
    if index.numel() == 0:
        return index
    mask = None if attention_mask is None else attention_mask.view(torch.uint8)
    spread = Spread.of(Covering(coverage, neighbours, per_region, order))
    spare = spread.spare_columns(mask, num_visual, num_rows)
    tiles = tile_options(num_rows)
    launch(
        surviving_rows_kernel,
        (batch,),
        (
            scores.contiguous(), visual_index.contiguous(), None if counts is None else counts.contiguous(), mask,
            spread.neighbours, spread.order, torch.empty((batch, num_rows), dtype=torch.int32, device=device),
            torch.empty((batch, spare), dtype=torch.int32, device=device) if spare else None, index,
        ),
        (),
        (keep, num_visual, num_rows, length, *((0, 0) if mask is None else mask.stride()), *spread.sizes, share, of_shares),
        (),
        spread.constants
        | {"BLOCK": tiles["BLOCK"], "BLOCK_FILL": FILL_BLOCK, "RESIDENT": tiles["RESIDENT"]},
        num_warps=tiles["num_warps"],
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return index


class Spread(NamedTuple):
    """What ``select_survivors`` takes of a coverage."""

    neighbours: Tensor | None
    order: Tensor | None
    sizes: tuple[int, ...]
    """Of ``neighbours`` and ``order``, how far samples are apart; and how many of each region are candidates."""
    constants: dict[str, Any]

    @classmethod
    def of(cls, covering: Covering) -> Spread:
        """Return it with tensors that are contiguous."""
        neighbours, order = (
            None if x is None else x.contiguous() for x in (covering.neighbours, covering.order)
        )
        strides = (0 if x is None or len(x) == 1 else x.stride(0) for x in (neighbours, order))
        constants = {
            "COVERAGE": covering.coverage,
            "NEIGHBOURS": 0 if neighbours is None else neighbours.shape[2],
        }
        return cls(neighbours, order, (*strides, covering.per_region), constants)

    def spare_columns(self, mask: Tensor | None, num_visual: int, num_rows: int) -> int:
        """Return how much more workspace the selection of a sample needs, int32, beside its keys."""
        if self.order is not None:
            return num_rows
        return 0 if self.neighbours is None or mask is None else num_visual


def gather_rows(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the copy; arguments and result as in ``reference.py``."""
    batch, length = index.shape
    ids = position_ids if position_ids.dim() == 3 else position_ids[None]
    outputs = new_outputs(hidden_states, cos, sin, position_ids, length)
    if index.numel() == 0:
        return outputs
    inputs = with_whole_rows(hidden_states), with_whole_rows(cos), with_whole_rows(sin)
    launch(
        gather_rows_kernel,
        (length, batch),
        (*inputs, ids, index.contiguous(), *outputs),
        (*(stride for x in inputs for stride in x.stride()[:2]), hidden_states.shape[2], cos.shape[2]),
        (*ids.stride(), length),
        (),
        {"AXES": ids.shape[0]}
        | copy_tiles(hidden_states.shape[2], cos.shape[2], hidden_states.element_size(), WARPS),
        num_warps=WARPS,
    )
    return outputs


def copy_tiles(channels: int, rotary: int, element_size: int, warps: int) -> dict[str, int]:
    """Return the tile sizes of ``copy_rows``: one tile for a whole row where registers hold it."""
    block = min(next_power_of_2(max(channels, 1)), COPY_BYTES * 32 * warps // element_size)
    return {
        "BLOCK_COPY": block,
        "COPIES": cdiv(channels, block),
        "BLOCK_ROTARY": next_power_of_2(max(rotary, 1)),
    }


def new_outputs(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate what the survivors' rows are copied to."""
    batch, _, channels = hidden_states.shape
    return (
        hidden_states.new_empty((batch, length, channels)),
        cos.new_empty((batch, length, cos.shape[2])),
        sin.new_empty((batch, length, sin.shape[2])),
        position_ids.new_empty((*position_ids.shape[:-1], length)),
    )


def with_whole_rows(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of it whose rows are contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
