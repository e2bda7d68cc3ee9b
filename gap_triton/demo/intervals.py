"""How sure a share of right answers is, and the difference of two shares on the same scenes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

Z = 1.959964  # two-sided 95%


def wilson_interval(successes: int, trials: int, z: float = Z) -> tuple[float, float]:
    """Return the Wilson score interval of a share (95% by default); ``trials`` >= 1."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"successes={successes}, trials={trials}: expected 0 <= successes <= trials, and trials >= 1"
        )
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # Rounding would otherwise leave a share of 0 or 1 just outside.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


@dataclass(frozen=True)
class Difference:
    """Share of right answers of one way minus that of another, on the same scenes.

    Attributes:
        value: The difference.
        low: Lower end of its 95% interval.
        high: Upper end.
        first_only: Scenes that only the first way answers right.
        second_only: Scenes that only the second way answers right.
    """

    value: float
    low: float
    high: float
    first_only: int
    second_only: int


def paired_difference(first: Tensor, second: Tensor, z: float = Z) -> Difference:
    """Compare two ways to answer on the same scenes: Newcombe's square-and-add interval for paired shares.

    It joins the two Wilson intervals, correcting for how much the answers go together (Newcombe, Statistics in
    Medicine 17, 1998, 2635-2650, method 10). Unlike a Wald interval it keeps a width where the ways never disagree.

    Args:
        first: Whether each scene was answered right, [N] bool.
        second: The same for the other way.
        z: Normal quantile of the interval, 95% by default.

    Raises:
        ValueError: The two are not of one shape [N], N >= 1.
    """
    if first.dim() != 1 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"first has shape {list(first.shape)}, second {list(second.shape)}; expected one [N], N >= 1, for both"
        )
    first, second = first.bool(), second.bool()
    count = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    first_only, second_only = int((first & ~second).sum()), int((~first & second).sum())
    hits, other_hits = both + first_only, both + second_only
    share, other = hits / count, other_hits / count
    low, high = wilson_interval(hits, count, z)
    other_low, other_high = wilson_interval(other_hits, count, z)
    # Correlation of the two, with a continuity correction where it is positive.
    product = float(both * neither - first_only * second_only)
    if product > 0:
        product = max(product - count / 2, 0.0)
    scale = math.sqrt(hits * (count - hits) * other_hits * (count - other_hits))
    phi = product / scale if scale else 0.0

    def joined(distance: float, other: float) -> float:
        return math.sqrt(max(distance * distance - 2 * phi * distance * other + other * other, 0.0))

    value = share - other
    return Difference(
        value=value,
        low=value - joined(share - low, other_high - other),
        high=value + joined(high - share, other - other_low),
        first_only=first_only,
        second_only=second_only,
    )
