"""Selection by a sort."""

from __future__ import annotations

import math


def fill(row: list[int], length: int) -> list[int]:
    """The rows ascending, behind fillers."""
    return [-1] * (length - len(row)) + sorted(row)


def oracle(scores: list[float], k: int) -> list[int]:
    """The k best by a sort on (is NaN, descending value, index), in ascending order."""
    keys = [(math.isnan(x), 0.0 if math.isnan(x) else -x, i) for i, x in enumerate(scores)]
    return sorted(i for _, _, i in sorted(keys)[:k])
