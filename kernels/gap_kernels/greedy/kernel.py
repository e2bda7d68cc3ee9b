# mypy: disable-error-code="no-untyped-def"
"""Greedy, similarity-aware selection in Triton.

1. ``prepare_kernel``: the length of each vector, its state and its weight, once;
2. ``pairs_kernel``: over all pairs, a tile of cosines at a time, for each token the nearest other (max-min) or what it
   would cover (coverage, which stores the cosines);
3. ``choose_kernel``: one program per sample chooses, and compares the chosen token with all others, step after step; by
   coverage ``cover_kernel`` (``coverage.py``), which reads stored cosines.

By coverage of more than 4,096 tokens no cosines are stored: then 2 and 3 are launched for every step.

With N tokens of C channels in e bytes, a step reads all features: ``N C e`` bytes a sample, 1.2 MB for 576 tokens of 1,024
in half precision. By determinant, step t reads ``4 t N`` bytes more, of the factor so far. All steps read them from the
L2 cache, where they fit (LLaVA-1.5's do). The floor for a GPU is the features once, ``N C e``; for this design it is k
times that through one multiprocessor per sample, as each choice waits for the one before. Over all pairs there are
``2 N^2 C`` operations, spread over N / BLOCK_M programs a sample: 0.7 GFLOP for those 576 tokens, 17 for 2,880; in every
step, where no cosines are stored. Nothing of this was measured.

Workspaces: a handful of vectors [B, N], by determinant the factor [B, k, N] float32, and by coverage the cosines
[B, N, N] float32, of a block of samples at a time (`blocks.row_blocks`). Products are as in ``aggregate``:
operands in the dtype of the features, sums in float32, in a fixed order; float32 never in TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import triton_is_interpreted
from ..blocks import row_blocks
from ..flash_attention.kernel import load_vectors
from ..importance.kernel import part_of
from ..launch import cdiv, launch, next_power_of_2
from ..select.kernel import WRITE_BLOCK
from . import reference
from .choice import (
    CANDIDATE,
    CHOSEN,
    DEPENDENT,
    DETERMINANT,
    LAST,
    MAX_MIN,
    MAX_WEIGHT,
    NEVER,
    NORM_EPSILON,
    NOTHING,
    best_token,
    write_chosen,
)
from .coverage import MOST_COSINES, choose_by_coverage

RULES = {"max_min": 0, "determinant": 1, "coverage_gain": 2}
SCAN_BLOCK = 1024
"""Tokens that are compared at a time, and rows of the factor times tokens that are read at a time."""
HISTORY_BLOCK = tl.constexpr(16)


@triton.jit(do_not_specialize=["n"])
def prepare_kernel(
    features,
    scores,
    mask,
    scale,
    state,
    value,
    weight,
    covered,
    stride_b,
    stride_n,
    n,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Prepare a tile of tokens, all [B, N]. Grid (B * token tiles).

    ``scale`` is what a vector is multiplied by to have length 1, ``value`` 1 where it has one, ``weight`` the score
    within 0 and the largest weight, ``covered`` 0; the first two, and ``state``, are as in ``reference.py``.
    """
    tiles = tl.cdiv(n, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < n
    place = batch * n + token
    pointer = features + batch * stride_b + token.to(tl.int64) * stride_n
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, C, BLOCK_C):
        part = load_vectors(pointer, inside, start, C, BLOCK_C, False).to(tl.float32)
        squares += tl.sum(part * part, 1)
    fine = squares < float("inf")  # nor is NaN
    if scores is not None:
        score = tl.load(scores + place, mask=inside, other=0.0)
        fine = fine & (score == score)
        score = tl.where(score == score, score, 0.0)
        tl.store(weight + place, tl.minimum(tl.maximum(score, 0.0), MAX_WEIGHT), mask=inside)
    kind = tl.where(fine, CANDIDATE, LAST)
    if mask is not None:
        kind = tl.where(tl.load(mask + place, mask=inside, other=0) != 0, kind, NEVER)
    norm = tl.sqrt(tl.where(fine, squares, 0.0))
    usable = (kind == CANDIDATE) & (norm > NORM_EPSILON)
    tl.store(state + place, kind, mask=inside)
    tl.store(scale + place, tl.where(usable, 1.0 / tl.where(usable, norm, 1.0), 0.0), mask=inside)
    tl.store(value + place, usable.to(tl.float32), mask=inside)
    if covered is not None:
        tl.store(covered + place, tl.zeros((BLOCK_N,), tl.float32), mask=inside)


@triton.jit(do_not_specialize=["n"])
def pairs_kernel(
    features,
    scale,
    state,
    covered,
    value,
    cosines,
    stride_b,
    stride_n,
    n,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compare one tile of tokens with all candidates: value [B, N] float32. Grid (B * token tiles).

    With ``covered`` [B, N] it is what each would cover more. ``cosines`` [B, N, N] float32 gets those of all pairs, and
    value what each would cover by itself. With neither it is the distance to the nearest other.
    """
    tiles = tl.cdiv(n, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    features += batch * stride_b
    scale += batch * n
    state += batch * n
    real = (token < n) & (tl.load(state + token, mask=token < n, other=0) == CANDIDATE)
    own_pointer = features + token.to(tl.int64) * stride_n
    own_scale = tl.load(scale + token, mask=real, other=0.0)

    gained = tl.zeros((BLOCK_M,), tl.float32)
    nearest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        usable = (column < n) & (tl.load(state + column, mask=column < n, other=0) == CANDIDATE)
        pointer = features + column.to(tl.int64) * stride_n
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, C, BLOCK_C):
            left = load_vectors(own_pointer, real, start, C, BLOCK_C, UPCAST)
            right = load_vectors(pointer, usable, start, C, BLOCK_C, UPCAST)
            products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
        cosine = products * own_scale[:, None] * tl.load(scale + column, mask=usable, other=0.0)[None, :]
        if cosines is not None:
            inside = (token < n)[:, None] & (column < n)[None, :]
            tl.store(cosines + batch * n * n + (token[:, None] * n + column[None, :]), cosine, mask=inside)
            gained += tl.sum(tl.where(usable[None, :] & (cosine > NOTHING), cosine, 0.0), 1)
        elif covered is not None:
            least = tl.load(covered + batch * n + column, mask=usable, other=0.0)
            more = cosine - least[None, :]
            gained += tl.sum(tl.where(usable[None, :] & (more > NOTHING), more, 0.0), 1)
        else:
            apart = usable[None, :] & (column[None, :] != token[:, None])
            nearest = tl.maximum(nearest, tl.max(tl.where(apart, cosine, -float("inf")), 1))
    if (cosines is None) & (covered is None):
        gained = tl.minimum(1.0 - nearest, 2.0)  # 2 where there is no other
    tl.store(value + batch * n + token, gained, mask=token < n)


@triton.jit
def spanned_by_chosen(history, token, usable, best, step, n, BLOCK_N: tl.constexpr):
    """Return the part of the cosines to the token ``best`` that lies in the span of the chosen ones, [BLOCK_N]."""
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, step, HISTORY_BLOCK):
        row = start + tl.arange(0, HISTORY_BLOCK)
        pointer = history + row.to(tl.int64) * n
        own = tl.load(pointer + best, mask=row < step, other=0.0)
        inside = (row < step)[:, None] & usable[None, :]
        total += tl.sum(tl.load(pointer[:, None] + token[None, :], mask=inside, other=0.0) * own[:, None], 0)
    return total


@triton.jit(do_not_specialize=["k", "n", "first", "last", "steps", "length"])
def choose_kernel(
    features,
    scale,
    state,
    value,
    weight,
    counts,
    covered,
    history,
    index,
    stride_b,
    stride_n,
    k,
    n,
    first,
    last,
    steps,
    length,
    RULE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    BLOCK_WRITE: tl.constexpr,
):
    """Choose for steps ``first..last`` of ``steps`` in one sample; the last one writes index [B, length]. Grid (B).

    ``value`` [B, N] is by max-min the distance to the chosen, before the first step to the nearest other; by determinant
    what isn't spanned; by coverage the gain, while ``covered`` [B, N] holds the largest cosines. ``history`` [B, steps, N]
    is the factor.
    ``counts`` [B] or None takes precedence over k.
    """
    sample = tl.program_id(0).to(tl.int64)
    if counts is not None:
        k = tl.load(counts + sample)
    budget = tl.minimum(k, steps).to(tl.int32)
    features += sample * stride_b
    scale += sample * n
    state += sample * n
    value += sample * n
    if weight is not None:
        weight += sample * n
    if covered is not None:
        covered += sample * n
    if history is not None:
        history += sample * steps * n

    for step in range(first, tl.minimum(last, budget)):
        best = best_token(state, value, weight, n, RULE, BLOCK_SCAN)
        if best < n:
            residual = tl.load(value + best)
            # A block and a scalar condition make no mask in the interpreter of Triton 3.9, so the scalar moves the bound.
            channels = tl.where(tl.load(state + best) == CANDIDATE, C, 0)
            tl.debug_barrier()  # other threads have read the state and the value
            tl.store(state + best, CHOSEN)
            tl.debug_barrier()
            own_scale = tl.load(scale + best)
            chosen = features + best.to(tl.int64) * stride_n
            for start_n in range(0, n, BLOCK_N):
                token = start_n + tl.arange(0, BLOCK_N)
                usable = tl.load(state + token, mask=token < n, other=0) == CANDIDATE
                usable = usable & (token < n)
                pointer = features + token.to(tl.int64) * stride_n
                products = tl.zeros((BLOCK_N,), tl.float32)
                for start in range(0, C, BLOCK_C):
                    c = start + tl.arange(0, BLOCK_C)
                    own = tl.load(chosen + c, mask=c < channels, other=0.0).to(tl.float32)
                    part = load_vectors(pointer, usable, start, C, BLOCK_C, False).to(tl.float32)
                    products += tl.sum(part * own[None, :], 1)
                cosine = products * tl.load(scale + token, mask=usable, other=0.0) * own_scale
                if RULE == MAX_MIN:
                    distance = 1.0 - cosine
                    before = tl.load(value + token, mask=usable, other=0.0)
                    distance = tl.where(step == 0, distance, tl.minimum(before, distance))
                    tl.store(value + token, distance, mask=usable)
                elif RULE == DETERMINANT:
                    row = cosine - spanned_by_chosen(history, token, usable, best, step, n, BLOCK_N)
                    row = tl.where(
                        residual > 0.0, row / tl.sqrt(tl.where(residual > 0.0, residual, 1.0)), 0.0
                    )
                    tl.store(history + tl.cast(step, tl.int64) * n + token, row, mask=usable)
                    left = tl.load(value + token, mask=usable, other=0.0) - row * row
                    tl.store(value + token, tl.where(left > DEPENDENT, left, 0.0), mask=usable)
                else:
                    before = tl.load(covered + token, mask=usable, other=0.0)
                    tl.store(covered + token, tl.maximum(before, cosine), mask=usable)
            tl.debug_barrier()  # other threads read what was stored

    if last == steps:
        write_chosen(index + sample * length, state, n, length, BLOCK_SCAN, BLOCK_WRITE)


def greedy_indices(
    features: Tensor,
    scores: Tensor | None,
    mask: Tensor | None,
    rule: str,
    exponent: float,
    k: int,
    counts: Tensor | None,
    length: int,
) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, n, channels = features.shape
    device = features.device
    steps = min(length, n)
    if batch == 0 or steps == 0:
        return torch.full((batch, length), -1, dtype=torch.int64, device=device)
    features = features if features.stride(-1) == 1 else features.contiguous()
    tiles = tile_options(channels, features.dtype == torch.float32)
    index = torch.empty((batch, length), dtype=torch.int64, device=device)
    scale, value = torch.empty((2, batch, n), dtype=torch.float32, device=device)
    state = torch.empty((batch, n), dtype=torch.int32, device=device)
    weight = None if scores is None else torch.empty_like(value)
    covered = torch.empty_like(value) if rule == "coverage_gain" else None
    strides = features.stride()[:2]
    launch(
        prepare_kernel,
        (batch * cdiv(n, tiles["ROWS"]),),
        (
            features,
            None if scores is None else scores.contiguous(),
            None if mask is None else mask.contiguous(),
            scale,
            state,
            value,
            weight,
            covered,
        ),
        strides,
        (n,),
        (),
        {"C": channels, "BLOCK_N": tiles["ROWS"], "BLOCK_C": tiles["PART"]},
        num_warps=4,
    )
    if weight is not None and exponent != 1:
        weight.pow_(exponent).clamp_(max=reference.MAX_WEIGHT)
    counts = None if counts is None else counts.contiguous()
    if covered is not None and n * n <= MOST_COSINES:
        for block in row_blocks(batch, n * n):
            own = features[block], scale[block], state[block]
            cosines = torch.empty((len(own[0]), n, n), dtype=torch.float32, device=device)
            _compare_pairs(*own, None, value[block], cosines, tiles)
            choose_by_coverage(
                cosines,
                state[block],
                value[block],
                None if weight is None else weight[block],
                None if counts is None else counts[block],
                covered[block],
                index[block],
                k,
            )
        return index
    history = None
    if rule == "max_min":
        _compare_pairs(features, scale, state, None, value, None, tiles)
    elif rule == "determinant":
        history = torch.empty((batch, steps, n), dtype=torch.float32, device=device)
    per_launch = steps if covered is None else 1
    for first in range(0, steps, per_launch):
        if covered is not None:
            _compare_pairs(features, scale, state, covered, value, None, tiles)
        launch(
            choose_kernel,
            (batch,),
            (
                features,
                scale,
                state,
                value,
                weight,
                counts,
                covered,
                history,
                index,
            ),
            strides,
            (k, n, first, first + per_launch, steps, length),
            (),
            {
                "RULE": RULES[rule],
                "C": channels,
                "BLOCK_N": tiles["ROWS"],
                "BLOCK_C": tiles["PART"],
                "BLOCK_SCAN": SCAN_BLOCK,
                "BLOCK_WRITE": WRITE_BLOCK,
            },
            num_warps=8,
            maxnreg=128,  # as below
        )
    return index


def _compare_pairs(
    features: Tensor,
    scale: Tensor,
    state: Tensor,
    covered: Tensor | None,
    value: Tensor,
    cosines: Tensor | None,
    tiles: dict[str, int],
) -> None:
    """Launch ``pairs_kernel``, which writes to ``value`` and ``cosines``."""
    batch, n, channels = features.shape
    launch(
        pairs_kernel,
        (batch * cdiv(n, tiles["BLOCK_M"]),),
        (features, scale, state, covered, value, cosines),
        features.stride()[:2],
        (n,),
        (),
        {
            "C": channels,
            **{name: tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C")},
            "UPCAST": triton_is_interpreted(),
        },
        num_warps=4,
        num_stages=2,
        maxnreg=168,  # left alone, NVIDIA's compiler spills a few values to fit one more program
    )


def tile_options(channels: int, exact: bool) -> dict[str, int]:
    """Return tile sizes, chosen without a timing: those of ``pairs_kernel``, and ROWS x PART of the others.

    ``exact`` says that features are float32, which isn't for tensor cores: operands stay in registers.
    """
    longest = max(16, next_power_of_2(max(1, channels)))
    side, part = (16, 16) if exact else (32, min(longest, 64))
    return {
        "BLOCK_M": side,
        "BLOCK_N": side if exact else 64,
        "BLOCK_C": part_of(channels, part),
        "ROWS": 32,
        "PART": part_of(channels, min(longest, 128)),
    }
