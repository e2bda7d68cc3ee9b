# mypy: disable-error-code="no-untyped-def"
"""Ranks by windows in Triton, one program per grid.

Each token is compared with those of its window, a row of that at a time. What enters has the key of its score, what does not
has the least there is, and one selection over these keys, as ``select`` has it, finds what comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from ..prune.kernel import with_whole_rows
from ..select.kernel import (
    MAX_REGISTERS,
    NAN_KEY,
    WRITE_BLOCK,
    load_keys,
    score_keys,
    select_threshold,
    tile_options,
)
from . import reference

COLUMNS = 64
"""Most columns of a window that a token is compared with at a time."""
PAIRS = 1024
"""Tokens times columns at a time."""
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def bounds_of(place, size, windows):
    """Return the first place of the window that ``place`` of ``size`` is in, and that behind its last."""
    window = place.to(tl.int64) * windows // size
    first = (window * size + windows - 1) // windows
    end = ((window + 1) * size + windows - 1) // windows
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit
def write_window_keys(
    earlier,
    keys,
    n,
    height,
    width,
    windows,
    enough,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the keys of one grid: of the ``enough`` best of each window those of their scores, of the others `NAN_KEY`."""
    for start in range(0, n, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        real = entry < n
        own = score_keys(tl.load(earlier + entry, mask=real, other=0.0))
        row, row_end = bounds_of(entry // width, height, windows)
        left, right = bounds_of(entry % width, width, windows)
        rank = tl.zeros((BLOCK,), tl.int32)
        for _ in range(0, (height + windows - 1) // windows):
            for first in range(0, (width + windows - 1) // windows, COLUMNS):
                column = left[:, None] + first + tl.arange(0, COLUMNS)[None, :]
                inside = (real & (row < row_end))[:, None] & (column < right[:, None])
                other = row[:, None] * width + column
                key = score_keys(tl.load(earlier + other, mask=inside, other=0.0))
                beats = (key > own[:, None]) | ((key == own[:, None]) & (other < entry[:, None]))
                rank += tl.sum((inside & beats).to(tl.int32), 1)
            row += 1
        # NaN that enters comes before what does not.
        own = tl.where(own == NAN_KEY, NAN_KEY + 1, own)
        tl.store(keys + entry, tl.where(rank < enough, own, NAN_KEY), mask=real)


# What changes from image to image isn't specialised on, or every new value could mean a new compilation.
@triton.jit(
    do_not_specialize=[
        "scores_stride_b", "earlier_stride_b", "n", "height", "width", "windows", "enough", "count"
    ]
)  # fmt: skip
def window_ranks_kernel(
    scores,
    earlier,
    keys,
    ranks,
    scores_stride_b,
    earlier_stride_b,
    n,
    height,
    width,
    windows,
    enough,
    count,
    BLOCK_RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WRITE: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Rank one grid: scores and earlier [B, N] -> ranks [B, N]; ``keys`` [B, N] is a workspace. Grid (B)."""
    sample = tl.program_id(0).to(tl.int64)
    scores += sample * scores_stride_b
    keys += sample * n
    ranks += sample * n
    write_window_keys(
        earlier + sample * earlier_stride_b, keys, n, height, width, windows, enough, BLOCK_RANK, COLUMNS
    )
    tl.debug_barrier()  # other threads of this program read these keys
    threshold, ties, _, _ = select_threshold(keys, n, count, BLOCK, RESIDENT, False)
    equal_before = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK_WRITE):
        entry = start + tl.arange(0, BLOCK_WRITE)
        key = load_keys(keys, start, n, BLOCK_WRITE, False)
        equal = ((key == threshold) & (entry < n)).to(tl.int32)
        is_first = (key > threshold) | ((equal > 0) & (equal_before + tl.cumsum(equal, 0) <= ties))
        score = tl.load(scores + entry, mask=entry < n, other=0.0)
        rank = tl.where(score == float("inf"), LARGEST, score)
        rank = tl.where(score == score, rank, float("-inf"))
        tl.store(ranks + entry, tl.where(is_first, float("inf"), rank), mask=entry < n)
        equal_before += tl.sum(equal, 0)


def window_ranks(
    scores: Tensor, earlier: Tensor, height: int, width: int, count: int, windows: int
) -> Tensor:
    """Launch the kernel; arguments and result as in ``reference.py``."""
    batch, n = scores.shape
    ranks = torch.empty((batch, n), dtype=torch.float32, device=scores.device)
    if not ranks.numel():
        return ranks
    scores, earlier = with_whole_rows(scores), with_whole_rows(earlier)
    columns = min(next_power_of_2(cdiv(width, windows)), COLUMNS)
    tiles = tile_options(n)
    launch(
        window_ranks_kernel,
        (batch,),
        (scores, earlier, torch.empty((batch, n), dtype=torch.int32, device=scores.device), ranks),
        (),
        (
            scores.stride(0), earlier.stride(0), n, height, width, windows,
            reference.enough(height, width, count, windows), count,
        ),
        (),
        {
            "BLOCK_RANK": min(PAIRS // columns, WRITE_BLOCK),
            "COLUMNS": columns,
            "BLOCK": tiles["BLOCK"],
            "BLOCK_WRITE": WRITE_BLOCK,
            "RESIDENT": tiles["RESIDENT"],
        },
        num_warps=tiles["num_warps"],
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return ranks
