"""How scores choose the visual tokens that are kept: the best anywhere, the best of each region, or some everywhere."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..region.op import candidates_of, check_neighbours, check_per_region
from ..validation import ShapeChecker, describe, is_number

Coverage = Literal["topk", "region", "stride"]

STRIDE_SHARE = Fraction(3, 10)
"""Share of the budget that ``coverage="stride"`` spends on the uniform sample.

FEATHER's released settings keep the union of the best 30% of the tokens and a lattice of stride 3, a ninth of
them. If the two overlap as chance has it, that is 1/9 of 1/9 + 8/9 x 0.3, so 29% of what is kept.
"""


SPREAD_DIGITS = 9
"""Most decimals of another share, so that it times any budget is an int64."""


class Covering(NamedTuple):
    """What the operators take of a coverage, in the order of their arguments."""

    coverage: str = "topk"
    neighbours: Tensor | None = None
    per_region: int = 0
    order: Tensor | None = None
    share: int = STRIDE_SHARE.numerator
    of_shares: int = STRIDE_SHARE.denominator


def check_coverage(coverage: object) -> None:
    """Check the name of a coverage.

    Raises:
        ValueError: If there is no such coverage.
    """
    if not isinstance(coverage, str) or coverage not in get_args(Coverage):
        raise ValueError(
            f"coverage: expected one of {', '.join(map(repr, get_args(Coverage)))}, got {describe(coverage)}"
        )


def covering(
    shapes: ShapeChecker,
    coverage: object,
    neighbours: Tensor | None,
    per_region: int | None,
    order: Tensor | None,
    spread: float | None = None,
) -> Covering:
    """Turn the arguments of `gap_kernels.prune_by_score` into those of the operators.

    Args:
        shapes: The call's shapes; ``B`` and ``V`` are already known.
        coverage: How scores choose.
        neighbours: [B or 1, V, M] int32, for ``"region"``.
        per_region: For ``"region"``; None = as many as are needed, 0 of the operators.
        order: [B or 1, V] int64, for ``"stride"``.
        spread: For ``"stride"``; None = `STRIDE_SHARE`.

    Raises:
        ValueError: If there is no such coverage, what it needs is missing, or something is given that it doesn't use.
    """
    check_coverage(coverage)
    _check_given("neighbours", neighbours, coverage, "region", "[B or 1, V, M], see grid_neighbours")
    _check_given("order", order, coverage, "stride", "[B or 1, V], the rank of each visual token")
    if per_region is not None:
        if coverage != "region":
            raise ValueError(
                f"per_region: expected None with coverage={coverage!r}, got {describe(per_region)}"
            )
        check_per_region(per_region)
    if neighbours is not None:
        check_neighbours(shapes, neighbours, "V M")  # R are query rows
    if order is not None:
        shapes.check_shared("order", order, "V", (torch.int64,))
    share = _share_of(spread, coverage)
    if shapes.sizes["V"] == 0:
        return Covering()  # nothing to choose, nor anything to choose by
    candidates = 0 if neighbours is None else candidates_of(per_region, neighbours)
    return Covering(str(coverage), neighbours, candidates, order, *share)


def as_ratio(share: float) -> tuple[int, int]:
    """Return the decimal that ``share`` prints as, numerator and denominator: `torch.compile` can't trace `fractions`."""
    mantissa, _, exponent = repr(share).partition("e")
    whole, _, digits = mantissa.partition(".")
    return int(whole + digits), 10 ** (len(digits) - int(exponent or 0))


def is_short(spread: float) -> bool:
    """Return whether the operators take a ``spread`` in 0..1: a kernel multiplies a budget by its digits."""
    return as_ratio(spread)[1] <= 10**SPREAD_DIGITS


def _share_of(spread: object, coverage: object) -> tuple[int, int]:
    """Return the share of the uniform sample, numerator and denominator."""
    if spread is None:
        return STRIDE_SHARE.numerator, STRIDE_SHARE.denominator
    if coverage != "stride":
        raise ValueError(f"spread: expected None with coverage={coverage!r}, got {describe(spread)}")
    if not is_number(spread) or not 0 <= spread <= 1 or not is_short(float(spread)):
        raise ValueError(
            f"spread: expected a float in 0..1 with at most {SPREAD_DIGITS} decimals, got {describe(spread)}"
        )
    return as_ratio(float(spread))


def _check_given(name: str, value: object, coverage: object, needed_by: str, what: str) -> None:
    """Check that an argument is given where it is needed, and there only."""
    if (value is None) != (coverage != needed_by):
        wanted = f"{what}, with" if value is None else "None with"
        raise ValueError(f"{name}: expected {wanted} coverage={coverage!r}, got {describe(value)}")
