"""``gap_kernels::greedy_indices``: registration, fake kernel and checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import use_triton
from ..library import fake, operator
from ..validation import FLOAT_DTYPES, ShapeChecker, check_counts, describe, is_finite
from . import reference

RULES = tuple(reference.CHOOSERS)


@operator("greedy_indices")
def greedy_indices_op(
    features: Tensor,
    scores: Tensor | None,
    mask: Tensor | None,
    rule: str,
    exponent: float,
    k: int,
    counts: Tensor | None,
    length: int,
) -> Tensor:
    """Run the operator; see `gap_kernels.greedy_indices` and ``reference.py``."""
    if counts is not None and counts.is_cpu and counts.numel():
        check_counts(counts, features.shape[1], length)
    given = (features, scores, mask, rule, exponent, k, counts, length)
    if features.dtype != torch.float64 and use_triton(features):
        from . import kernel

        return kernel.greedy_indices(*given)
    return reference.greedy_indices(*given)


@fake("greedy_indices")
def _(features: Tensor, length: int) -> Tensor:
    return features.new_empty((features.shape[0], length), dtype=torch.int64)


def check_greedy(
    shapes: ShapeChecker,
    features: Tensor,
    scores: Tensor | None,
    mask: Tensor | None,
    rule: str,
    exponent: float,
) -> None:
    """Check the arguments of `gap_kernels.greedy_indices` that ``topk_indices`` doesn't have.

    Raises:
        ValueError: If one has another shape, dtype or device than documented, or is out of range.
    """
    shapes.check("features", features, "B N C", FLOAT_DTYPES)
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {describe(rule)}")
    if scores is not None:
        shapes.check("scores", scores, "B N", (torch.float32,))
        if rule == "max_min":
            raise ValueError(
                f"scores: expected None with rule 'max_min', which chooses by distance alone, got {describe(scores)}"
            )
    if mask is not None:
        shapes.check("mask", mask, "B N", (torch.bool,))
    if not is_finite(exponent) or exponent < 0:
        raise ValueError(f"exponent: expected a finite float >= 0, got {describe(exponent)}")
