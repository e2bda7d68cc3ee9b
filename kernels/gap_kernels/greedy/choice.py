# mypy: disable-error-code="no-untyped-def"
"""Which token is next, in Triton: by what it adds, and of those that add as much the first."""

from __future__ import annotations

import triton
import triton.language as tl

from ..select.kernel import write_selected
from . import reference

NEVER = tl.constexpr(reference.NEVER)
LAST = tl.constexpr(reference.LAST)
CANDIDATE = tl.constexpr(reference.CANDIDATE)
CHOSEN = tl.constexpr(reference.CHOSEN)
DEPENDENT = tl.constexpr(reference.DEPENDENT)
NOTHING = tl.constexpr(reference.NOTHING)
TIE = tl.constexpr(reference.TIE)
NORM_EPSILON = tl.constexpr(reference.NORM_EPSILON)
MAX_WEIGHT = tl.constexpr(reference.MAX_WEIGHT)
MAX_MIN, DETERMINANT, COVERAGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_keys(state, value, weight, start, n, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Return tokens and what they are chosen by, as in ``reference.py``."""
    token = start + tl.arange(0, BLOCK)
    kind = tl.load(state + token, mask=token < n, other=0)
    key = tl.load(value + token, mask=token < n, other=0.0)
    if RULE == DETERMINANT:
        key = tl.sqrt(key)
    key = tl.where(key > NOTHING, key, 0.0)
    if weight is not None:
        key *= tl.load(weight + token, mask=token < n, other=0.0)
    return token, tl.where(kind == CANDIDATE, key, tl.where(kind == LAST, -1.0, -float("inf")))


@triton.jit
def best_token(state, value, weight, n, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the token that is next, n if there is none."""
    largest = tl.full((), -float("inf"), tl.float32)
    for start in range(0, n, BLOCK):
        _, key = load_keys(state, value, weight, start, n, RULE, BLOCK)
        largest = tl.maximum(largest, tl.max(key, 0))
    best = n
    if largest > -float("inf"):
        for start in range(0, n, BLOCK):
            token, key = load_keys(state, value, weight, start, n, RULE, BLOCK)
            equal = key >= largest - TIE * tl.abs(largest)
            best = tl.minimum(best, tl.min(tl.where(equal, token, n), 0))
    return best


@triton.jit
def write_chosen(index, state, n, length, BLOCK_SCAN: tl.constexpr, BLOCK_WRITE: tl.constexpr):
    """Write the chosen tokens of one sample, ascending, behind fillers."""
    total = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK_SCAN):
        token = start + tl.arange(0, BLOCK_SCAN)
        total += tl.sum((tl.load(state + token, mask=token < n, other=0) == CHOSEN).to(tl.int32), 0)
    write_selected(index, state, n, length, CANDIDATE, 0, total, BLOCK_WRITE, False, False)
