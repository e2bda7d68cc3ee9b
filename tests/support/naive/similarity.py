"""Selection by similarity, one token and one pair at a time, in float64."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from .greedy import cosine

CLEAR = 2e-6
"""How far apart cosines must be for float32 to see which is larger."""


def cosines(features: Tensor) -> list[list[float]]:
    """Of all pairs; NaN where one of the two holds NaN or infinity."""
    rows = features.double().tolist()
    fine = [all(map(math.isfinite, row)) for row in rows]
    return [
        [
            cosine(one, other) if fine[i] and fine[j] else math.nan
            for j, other in enumerate(rows)
        ]
        for i, one in enumerate(rows)
    ]  # fmt: skip


def gap_of(values: list[float]) -> float:
    """The least difference of two of them; copies of 0 and of infinity have none."""
    return min((b - a for a, b in pairwise(sorted(values)) if a != b or 0 < abs(a) < math.inf), default=1.0)


def distinct(
    features: Tensor, scores: list[float], k: int, important: int, at_once: int
) -> tuple[list[int], float]:
    """One sample of `gap_kernels.distinct_indices`, and how clear it is."""
    similar, clear = cosines(features), 1.0
    by_score = [(math.isnan(x), 0.0 if math.isnan(x) else -x, i) for i, x in enumerate(scores)]
    order = [i for _, _, i in sorted(by_score)]
    best, others = order[:important], order[important:]
    while len(others) > k - important > 0:
        first, second = others[::2], others[1::2]
        alike = {}
        for token in first:
            real = [similar[token][other] for other in second if not math.isnan(similar[token][other])]
            alike[token] = max(real, default=math.inf)
        clear = min(clear, gap_of(list(alike.values())))
        gone = min(at_once, len(others) - (k - important), len(first))
        others = sorted(first, key=lambda token: -alike[token])[gone:] + second
    return sorted(best + others[: k - important]), clear


def least_similar(
    features: Tensor, pivots: list[int], k: int, mask: list[bool] | None
) -> tuple[list[int], float]:
    """One sample of `gap_kernels.least_similar_indices`, -1 in ``pivots`` being filler, and how clear it is."""
    similar, clear = cosines(features), 1.0
    real = [token for token in range(len(similar)) if mask is None or mask[token]]
    k = min(k, len(real))
    pivots = [pivot for pivot in pivots if pivot in real][:k]
    chosen, rest = list(pivots), k - len(pivots)
    for number, pivot in enumerate(pivots):
        keys = {token: similar[pivot][token] for token in real if token not in chosen}
        keys = {token: math.inf if math.isnan(key) else key for token, key in keys.items()}
        share = rest * (number + 1) // len(pivots) - rest * number // len(pivots)
        if share:
            clear = min(clear, gap_of(list(keys.values())))
        chosen += sorted(keys, key=lambda token: (keys[token], token))[:share]
    return sorted(chosen), clear
