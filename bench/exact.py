"""Results against float64, and against each other bit by bit."""

from __future__ import annotations

import gap_kernels
import torch
from torch import Tensor

from bench import agree
from bench.operators import Call, Result, spread_of
from bench.shapes import Inputs

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing(left: Result, right: Result) -> Tensor:
    """How many elements differ in their bits: an int64 scalar on the device, so that counting doesn't wait for it."""
    counts = []
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape, f"shapes differ: {list(one.shape)} and {list(other.shape)}"
        kind = INTEGERS[one.dtype.itemsize]
        counts.append((one.contiguous().view(kind) != other.contiguous().view(kind)).sum())
    return torch.stack(counts).sum()


def check(call: Call, x: Inputs, operator: Call | None = None) -> float:
    """Compare one call with the reference in float64.

    Scores, log-sum-exp and importance are computed in float32 whatever the dtype of the model, and held to that; rows
    and indices must be exactly those that follow from the scores.

    Args:
        call: What is checked, on its default path.
        x: Its inputs.
        operator: The operator that the call is a way to run; None = the call itself.

    Returns:
        The largest error of a floating point result, relative to the result's mean size.

    Raises:
        AssertionError: saying what differs.
    """
    result = call(x)
    with gap_kernels.backend("reference"):
        exact = (operator or call)(x.double())
        if len(result) >= 5:  # a pruned prompt, and its scores unless they were given
            scores, wanted = (result[5], exact[5]) if len(result) == 6 else (x.scores, x.scores)
            agree.close(wanted, scores, torch.float32)
            rows = (x.hidden_states, x.cos, x.sin, x.position_ids, x.visual_index)
            coverage = getattr(operator or call, "keywords", {}).get("coverage", "topk")
            spread = spread_of(x, coverage)
            follows = gap_kernels.prune_by_score(
                scores, *rows, x.keep, length=x.length, coverage=coverage, **spread
            )
            same = int(differing(result[:5], tuple(follows)[:5])) == 0
            assert same, "rows or indices don't follow from the scores"
            return _error(wanted, scores)
    largest = 0.0
    for ours, wanted in zip(result, exact, strict=True):
        if wanted.dtype == torch.int64:
            assert torch.equal(ours, wanted), f"{int((ours != wanted).sum())} indices differ"
            continue
        # Attention's output alone is rounded to the model's dtype.
        agree.close(wanted, ours, ours.dtype)
        largest = max(largest, _error(wanted, ours))
    return largest


def _error(exact: Tensor, ours: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().mean().clamp(min=1e-30))
