"""Greedy, similarity-aware selection in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import blocks
from ..select.reference import first_ascending

NORM_EPSILON = 1e-12
"""A vector that isn't longer counts as one of zeros."""
DEPENDENT = 1e-5
"""A token of which at most this part isn't spanned by the chosen ones counts as spanned: float32 can't tell less from 0."""
NOTHING = 1e-6
"""A distance, or what a token would be covered more, counts as 0 unless it is larger, for the same reason."""
TIE = 1e-5
"""Values that are smaller than the largest by at most this part of it count as equal. Two tokens that are each other's
nearest, or would cover each other and nothing else, have one value that is rounded in two ways."""
MAX_WEIGHT = 2.0**100
"""Larger weights count as this, so that a sum of 2^24 times one is finite in float32."""
AT_ONCE = 64
"""Tokens whose gain is computed again at a time."""
NEVER, LAST, CANDIDATE, CHOSEN = range(4)
"""States of a token: hidden by the mask, spoiled (chosen behind all candidates), not chosen yet, chosen."""


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
    """Choose ``counts[b]`` (or ``k``) tokens of each sample, one after another; float64 features make it the oracle.

    No tensor has more elements than the largest of ``blocks.BLOCK_ELEMENTS`` (or one row of cosines, B * N), the
    features and, by determinant, B * length * N. By coverage of more pairs than that, the CPU's path depends on values.

    Args:
        features: [B, N, C].
        scores: [B, N] float32 or None.
        mask: [B, N] bool or None.
        rule: "max_min", "determinant" or "coverage_gain".
        exponent: Of the scores.
        k: How many to choose in every sample; unused where ``counts`` is given.
        counts: [B] int64 or None.
        length: Columns of the result.

    Returns:
        [B, length] int64, ascending in each row, filled with -1 on the left.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    values = features.to(dtype)
    squares = values.square().sum(-1)
    state = states(squares, scores, mask)
    scale = inverse_norms(squares, state)
    # `where`, not a product: what isn't a candidate may be NaN.
    unit = torch.where((state == CANDIDATE)[:, :, None], values * scale[:, :, None], 0.0)
    weight = None if scores is None else weights(scores, exponent)
    batch, num_tokens = state.shape
    steps = min(length, num_tokens)
    chooser = CHOOSERS[rule](unit, scale, steps, weight)
    order = torch.full((batch, num_tokens), -1, device=features.device)
    for step in range(steps):
        value = chooser.values(state)
        value = torch.where(value > NOTHING, value, 0.0)
        value = value if weight is None else value * weight
        key = torch.where(state == CANDIDATE, value, torch.where(state == LAST, -1.0, -math.inf))
        largest = key.amax(-1, keepdim=True)
        best = (
            (key >= largest - TIE * largest.abs()).int().argmax(-1, keepdim=True)
        )  # the first of equal ones
        there = largest > -math.inf
        order[:, step, None] = torch.where(there, best, -1)
        state.scatter_(1, best, torch.where(there, CHOSEN, NEVER).to(state.dtype))
        pivot = unit.gather(1, best[:, :, None].expand(-1, -1, unit.shape[2]))  # [B, 1, C]
        chooser.choose(step, best, (unit @ pivot.transpose(1, 2))[:, :, 0])
    return first_ascending(order, k, counts, length)


def states(squares: Tensor, scores: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the state of each token before any is chosen, [B, N] int32, from sums of squares [B, N]."""
    fine = squares.isfinite()
    if scores is not None:
        fine &= ~scores.isnan()
    state = torch.where(fine, CANDIDATE, LAST)
    return (state if mask is None else torch.where(mask, state, NEVER)).int()


def inverse_norms(squares: Tensor, state: Tensor) -> Tensor:
    """Return what vectors are multiplied by to have length 1, [B, N]; 0 for those of zeros and what is no candidate."""
    norms = squares.sqrt()
    return torch.where((state == CANDIDATE) & (norms > NORM_EPSILON), 1 / norms, 0.0)


def weights(scores: Tensor, exponent: float) -> Tensor:
    """Return the weights [B, N] float32 of scores, none of which is NaN, infinite or negative."""
    return scores.nan_to_num(0.0).clamp(0.0, MAX_WEIGHT).pow(exponent).clamp(max=MAX_WEIGHT)


class _Chooser(Protocol):
    """What a rule knows while tokens are chosen."""

    def __init__(self, unit: Tensor, scale: Tensor, steps: int, weight: Tensor | None) -> None:
        """Prepare for ``steps`` choices among vectors ``unit`` [B, N, C] of length 1, or 0 where they are no candidates."""

    def values(self, state: Tensor) -> Tensor:
        """Return what each candidate adds, [B, N], without its weight."""

    def choose(self, step: int, best: Tensor, cosine: Tensor) -> None:
        """Take in that ``best`` [B, 1] is chosen, from its cosines [B, N] to all."""


class _MaxMin(_Chooser):
    """The distance to the nearest of the chosen tokens; before there is one, to the nearest of the others."""

    def __init__(self, unit: Tensor, scale: Tensor, steps: int, weight: Tensor | None) -> None:
        self.unit = unit
        self.distance: Tensor | None = None

    def values(self, state: Tensor) -> Tensor:
        if self.distance is not None:
            return self.distance
        batch, num_tokens = state.shape
        nearest = self.unit.new_empty((batch, num_tokens))
        token = torch.arange(num_tokens, device=state.device)
        hidden = (state != CANDIDATE)[:, None, :]
        for block in blocks.row_blocks(num_tokens, batch * num_tokens):
            cosine = self.unit[:, block] @ self.unit.transpose(1, 2)
            cosine.masked_fill_(hidden | (token[block, None] == token), -math.inf)
            nearest[:, block] = cosine.amax(-1)
        return (1 - nearest).clamp(max=2)  # 2 where there is no other

    def choose(self, step: int, best: Tensor, cosine: Tensor) -> None:
        distance = 1 - cosine
        self.distance = distance if self.distance is None else torch.minimum(self.distance, distance)


class _Determinant(_Chooser):
    """The root of what the determinant of the chosen tokens' cosines is multiplied by, or 0 where that is rounding.

    Row t of ``history`` is that of the Cholesky factor for the t-th chosen token, over all tokens.
    """

    def __init__(self, unit: Tensor, scale: Tensor, steps: int, weight: Tensor | None) -> None:
        self.residual = (scale > 0).to(
            unit.dtype
        )  # not the square of a unit vector, which is 1 but for rounding
        self.history = unit.new_zeros((unit.shape[0], steps, unit.shape[1]))

    def values(self, state: Tensor) -> Tensor:
        return self.residual.sqrt()

    def choose(self, step: int, best: Tensor, cosine: Tensor) -> None:
        before = self.history[:, :step]
        own = before.gather(2, best[:, None, :].expand(-1, step, -1))  # [B, step, 1]
        residual = self.residual.gather(1, best)
        row = (cosine - (own.transpose(1, 2) @ before)[:, 0]) * torch.where(
            residual > 0, residual.rsqrt(), 0.0
        )
        self.history[:, step] = row
        left = self.residual - row.square()
        self.residual = torch.where(left > DEPENDENT, left, 0.0)


class _Coverage(_Chooser):
    """How much better all candidates would be covered: a token is covered by its largest cosine to a chosen one.

    Cosines of all pairs are kept where they are few, and computed again in every step where they are many. On the CPU that
    is only for tokens whose gain may be the largest: it never grows, so that the one of an earlier step is a bound.
    """

    def __init__(self, unit: Tensor, scale: Tensor, steps: int, weight: Tensor | None) -> None:
        self.unit = unit
        self.weight = 1.0 if weight is None else weight
        self.covered = unit.new_zeros(unit.shape[:2])
        batch, num_tokens, _ = unit.shape
        fits = batch * num_tokens * num_tokens <= blocks.BLOCK_ELEMENTS
        self.cosine = unit @ unit.transpose(1, 2) if fits else None
        self.gain = unit.new_full((batch, num_tokens), num_tokens + 1.0)

    def values(self, state: Tensor) -> Tensor:
        # What isn't a candidate needs no more covering.
        covered = torch.where(state == CANDIDATE, self.covered, math.inf)[:, None, :]
        if self.cosine is None and self.unit.is_cpu:
            self._renew(state == CANDIDATE, covered)
            return self.gain
        batch, num_tokens = state.shape
        for block in blocks.row_blocks(num_tokens, batch * num_tokens):
            known = None if self.cosine is None else self.cosine[:, block]
            self.gain[:, block] = self._gain_of(self.unit[:, block], covered, known)
        return self.gain

    def _gain_of(self, unit: Tensor, covered: Tensor, cosine: Tensor | None = None) -> Tensor:
        """Return the gain [B, m] of some tokens, rows of ``unit`` [B, m, C]."""
        cosine = unit @ self.unit.transpose(1, 2) if cosine is None else cosine
        return F.threshold(cosine - covered, NOTHING, 0.0, inplace=True).sum(-1)

    def _renew(self, candidate: Tensor, covered: Tensor) -> None:
        """Compute gains again until no other may be as large as the largest of these."""
        batch, num_tokens = candidate.shape
        at_once = min(num_tokens, AT_ONCE, max(1, blocks.BLOCK_ELEMENTS // (batch * num_tokens)))
        old = candidate
        while True:
            key = torch.where(candidate, self.gain * self.weight, -1.0)
            largest = torch.where(old, -1.0, key).amax(-1, keepdim=True)
            key = torch.where(old & (key >= largest * (1 - 2 * TIE)), key, -1.0)
            if bool((key < 0).all()):
                return
            row = key.topk(at_once, dim=-1).indices
            unit = self.unit.gather(1, row[:, :, None].expand(-1, -1, self.unit.shape[2]))
            self.gain.scatter_(1, row, self._gain_of(unit, covered))
            old = old.scatter(1, row, False)

    def choose(self, step: int, best: Tensor, cosine: Tensor) -> None:
        self.covered = torch.maximum(self.covered, cosine)


CHOOSERS: dict[str, type[_Chooser]] = {
    "max_min": _MaxMin,
    "determinant": _Determinant,
    "coverage_gain": _Coverage,
}
