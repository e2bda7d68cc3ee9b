"""Checks that two ways to compute a result agree, before either is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.operators import Result
from bench.shapes import Inputs

ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""Relative error that a result may have if computed in this dtype throughout, with a few roundings on the way."""


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Fail unless two floating point results agree as far as a computation in ``dtype`` can.

    The absolute part is measured against the typical size of the result, so that scores of 1e-4 can't pass by being
    small.
    """
    assert ours.shape == theirs.shape, f"shapes differ: {list(ours.shape)} and {list(theirs.shape)}"
    ours, theirs = ours.double(), theirs.double()
    size = float(ours.abs().mean())
    torch.testing.assert_close(theirs, ours, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] * size)


def same_choice(ours: Tensor, theirs: Tensor, scores: Tensor, dtype: torch.dtype | None) -> None:
    """Fail unless two selections are equal, but for candidates whose scores are equal within rounding.

    Args:
        ours: int64 [B, K], ascending, distinct.
        theirs: int64 [B, K], likewise.
        scores: [B, V], what ours was chosen by; indices from V on have no score and must be in both.
        dtype: dtype in which theirs was scored; None: theirs had the same scores, so only ties may differ.
    """
    assert ours.shape == theirs.shape, f"shapes differ: {list(ours.shape)} and {list(theirs.shape)}"
    assert bool((theirs[:, 1:] > theirs[:, :-1]).all()), "the indices are not ascending and distinct"
    for sample in range(len(ours)):
        mine, other = (set(index[sample].tolist()) for index in (ours, theirs))
        if mine == other:
            continue
        only_mine, only_other = sorted(mine - other), sorted(other - mine)
        assert max(only_mine + only_other) < scores.shape[1], f"sample {sample}: a text row is missing"
        lost, won = scores[sample, only_mine], scores[sample, only_other]
        gap = float(lost.max() - won.min())
        size = float(lost.max().abs() + scores.abs().mean())
        allowed = 0.0 if dtype is None else ROUNDING[dtype] * size
        assert gap <= allowed, (
            f"sample {sample}: {len(only_mine)} of {len(mine)} indices differ, by {gap:.3g} in score; rounding allows"
            f" {allowed:.3g}"
        )


def same_scores(ours: Tensor, theirs: Tensor, scores: Tensor) -> None:
    """Fail unless two selections, int64 [B, K], ascending and distinct, took the same scores of [B, V]."""
    assert ours.shape == theirs.shape, f"shapes differ: {list(ours.shape)} and {list(theirs.shape)}"
    assert bool((theirs[:, 1:] > theirs[:, :-1]).all()), "the indices are not ascending and distinct"
    taken, wanted = (scores.gather(1, index).sort(-1).values for index in (theirs, ours))
    assert torch.equal(taken, wanted), f"{int((taken != wanted).sum())} scores differ"


def same_pruning(x: Inputs, ours: Result, theirs: Result, dtype: torch.dtype) -> None:
    """Fail unless two results of ``prune_tokens`` agree, and the rows of theirs are those that its index names."""
    *rows, index, scores = theirs
    close(ours[5], scores, dtype)
    same_choice(ours[4], index, ours[5], dtype)
    for name, source, copied in zip(
        ("hidden_states", "cos", "sin"), (x.hidden_states, x.cos, x.sin), rows, strict=False
    ):
        wanted = source.gather(1, index[..., None].expand(-1, -1, source.shape[2]))
        assert torch.equal(copied, wanted), f"{name}: not the rows that the index names"
    wanted = x.position_ids.gather(-1, index.expand(*x.position_ids.shape[:-1], -1))
    assert torch.equal(rows[3], wanted), "position_ids: not those of the rows that the index names"
