# mypy: disable-error-code="no-untyped-def"
"""All steps of greedy coverage in one launch, from stored cosines.

A gain never grows, so that of an earlier step is a bound: a step computes gains again for the tile of tokens with the
largest bound, and then for those tiles whose bounds reach what it has found (lazy evaluation: Minoux, "Accelerated greedy
algorithms for maximizing submodular set functions", 1978). One program per sample, as each choice waits for the one before.

With N tokens, cosines are ``4 N^2`` bytes a sample: 1.3 MB for 576 tokens, 33 MB for 2,880. A step reads those of
the tiles that it computes again, all of them at worst, from the L2 cache where they fit, and twice a vector of N bounds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..select.kernel import WRITE_BLOCK
from .choice import CANDIDATE, CHOSEN, COVERAGE, NOTHING, TIE, best_token, load_keys, write_chosen

MOST_COSINES = 1 << 24
"""More of a sample, 64 MiB, are not stored."""
TILE_TOKENS, TILE_COLUMNS = 16, 256
SCAN_BLOCK = 1024


@triton.jit
def renew_tile(cosine, state, covered, value, weight, first, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Compute the gains of candidates ``first..first + BLOCK_M`` again; return the largest key of them."""
    token = first + tl.arange(0, BLOCK_M)
    real = (token < n) & (tl.load(state + token, mask=token < n, other=0) == CANDIDATE)
    gained = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        usable = (column < n) & (tl.load(state + column, mask=column < n, other=0) == CANDIDATE)
        least = tl.load(covered + column, mask=usable, other=0.0)
        inside = real[:, None] & usable[None, :]
        pointer = cosine + token.to(tl.int64)[:, None] * n + column[None, :]
        more = tl.load(pointer, mask=inside, other=0.0) - least[None, :]
        gained += tl.sum(tl.where(inside & (more > NOTHING), more, 0.0), 1)
    tl.debug_barrier()  # other threads have read the values
    tl.store(value + token, gained, mask=real)
    key = tl.where(gained > NOTHING, gained, 0.0)
    if weight is not None:
        key *= tl.load(weight + token, mask=real, other=0.0)
    return tl.max(tl.where(real, key, 0.0), 0)


@triton.jit
def renew_gains(
    cosine, state, covered, value, weight, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SCAN: tl.constexpr,
):  # fmt: skip
    """Compute gains again until none that is left can be the largest, or count as equal to it."""
    likely = best_token(state, value, weight, n, COVERAGE, BLOCK_SCAN)
    largest = tl.full((), 0.0, tl.float32)
    if likely < n:
        likely = likely // BLOCK_M * BLOCK_M
        largest = renew_tile(cosine, state, covered, value, weight, likely, n, BLOCK_M, BLOCK_N)
    for first in range(0, n, BLOCK_M):
        if first != likely:
            _, bound = load_keys(state, value, weight, first, n, COVERAGE, BLOCK_M)
            bound = tl.max(bound, 0)
            if (bound > 0.0) & (bound >= largest * (1 - 2 * TIE)):
                found = renew_tile(cosine, state, covered, value, weight, first, n, BLOCK_M, BLOCK_N)
                largest = tl.maximum(largest, found)
    tl.debug_barrier()  # other threads read the values


# What changes from image to image isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["k", "n", "steps", "length"])
def cover_kernel(
    cosine,
    state,
    value,
    weight,
    counts,
    covered,
    index,
    k,
    n,
    steps,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    BLOCK_WRITE: tl.constexpr,
):
    """Choose in one sample: index [B, length] from cosines [B, N, N] float32. Grid (B).

    ``value`` [B, N] are the gains before the first step, ``covered`` [B, N] zeros; ``state`` and ``weight`` are as in
    ``choose_kernel``. ``counts`` [B] or None takes precedence over k.
    """
    sample = tl.program_id(0).to(tl.int64)
    if counts is not None:
        k = tl.load(counts + sample)
    budget = tl.minimum(k, steps).to(tl.int32)
    cosine += sample * n * n
    state += sample * n
    value += sample * n
    covered += sample * n
    if weight is not None:
        weight += sample * n

    for step in range(0, budget):
        if step > 0:
            renew_gains(cosine, state, covered, value, weight, n, BLOCK_M, BLOCK_N, BLOCK_SCAN)
        best = best_token(state, value, weight, n, COVERAGE, BLOCK_SCAN)
        if best < n:
            # A spoiled token covers nothing.
            columns = tl.where(tl.load(state + best) == CANDIDATE, n, 0)
            tl.debug_barrier()  # other threads have read the state
            tl.store(state + best, CHOSEN)
            tl.debug_barrier()
            own = cosine + best.to(tl.int64) * n
            for start in range(0, columns, BLOCK_SCAN):
                token = start + tl.arange(0, BLOCK_SCAN)
                before = tl.load(covered + token, mask=token < n, other=0.0)
                now = tl.load(own + token, mask=token < n, other=0.0)
                tl.store(covered + token, tl.maximum(before, now), mask=token < n)
            tl.debug_barrier()  # other threads read what was stored

    write_chosen(index + sample * length, state, n, length, BLOCK_SCAN, BLOCK_WRITE)


def choose_by_coverage(
    cosine: Tensor,
    state: Tensor,
    value: Tensor,
    weight: Tensor | None,
    counts: Tensor | None,
    covered: Tensor,
    index: Tensor,
    k: int,
) -> None:
    """Launch ``cover_kernel``, which writes to ``index`` and changes ``state``, ``value`` and ``covered``."""
    batch, n = state.shape
    launch(
        cover_kernel,
        (batch,),
        (cosine, state, value, weight, counts, covered, index),
        (),
        (k, n, min(index.shape[1], n), index.shape[1]),
        (),
        {
            "BLOCK_M": TILE_TOKENS,
            "BLOCK_N": TILE_COLUMNS,
            "BLOCK_SCAN": SCAN_BLOCK,
            "BLOCK_WRITE": WRITE_BLOCK,
        },
        num_warps=8,
        maxnreg=128,  # left alone, NVIDIA's compiler takes more than 256 threads can have twice
    )
