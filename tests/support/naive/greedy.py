"""Greedy selection, one token and one pair at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIE, NOTHING = 1e-5, 1e-6
"""How much less than the largest value, relative to it, counts as equal, and what counts as 0."""
CLEAR = 2e-6
"""How far from the limit of what counts as equal values must be for float32 to see on which side they are."""
SPANNED = 1e-5
"""By determinant, what is left of a token that counts as spanned by others."""


def cosine(a: list[float], b: list[float]) -> float:
    lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in (a, b)]
    if min(lengths) <= 1e-12:
        return 0.0
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0] * lengths[1])


def gain(
    rule: str, token: int, chosen: list[int], candidates: list[int], cosines: list[list[float]]
) -> float:
    """What a token adds, without its weight."""
    if rule == "max_min":
        others = chosen or [other for other in candidates if other != token]
        return min((1 - cosines[token][other] for other in others), default=2.0)
    if rule == "coverage_gain":
        covered = {j: max([0.0, *(cosines[j][other] for other in chosen)]) for j in candidates}
        more = [cosines[token][j] - covered[j] for j in candidates]
        return math.fsum(term for term in more if term > NOTHING)
    independent: list[int] = []
    for other in [*chosen, token]:
        left = ratio(cosines, independent, other)
        if left > SPANNED:
            independent.append(other)
        elif other == token:
            return 0.0
    return math.sqrt(left)


def ratio(cosines: list[list[float]], chosen: list[int], token: int) -> float:
    """The determinant with one token more over that without."""

    def determinant(rows: list[int]) -> float:
        return float(torch.linalg.det(torch.tensor([[cosines[i][j] for j in rows] for i in rows]).double()))

    return determinant([*chosen, token]) / determinant(chosen) if chosen else round(cosines[token][token])


def oracle(
    features: Tensor,
    k: int,
    rule: str,
    scores: list[float] | None = None,
    exponent: float = 1.0,
    mask: list[bool] | None = None,
) -> tuple[list[int], float]:
    """Choose in one sample, features [N, C].

    Returns:
        The indices, ascending, and how far any value was from the limit of what counts as equal, relative to the largest.
    """
    rows = features.double().tolist()
    real = [i for i in range(len(rows)) if mask is None or mask[i]]
    fine = [
        i for i in real if all(map(math.isfinite, rows[i])) and (scores is None or not math.isnan(scores[i]))
    ]
    cosines = [
        [cosine(a, b) if i in fine and j in fine else 0.0 for j, b in enumerate(rows)]
        for i, a in enumerate(rows)
    ]
    weight = [
        1.0 if scores is None else min(max(0.0, s), 2.0**100) ** exponent if s == s else 0.0
        for s in scores or rows
    ]
    chosen: list[int] = []
    clear = 1.0
    while fine and len(chosen) < k:
        left = [i for i in fine if i not in chosen]
        if not left:
            break
        gains = {i: gain(rule, i, chosen, fine, cosines) for i in left}
        values = {i: weight[i] * (gains[i] if gains[i] > NOTHING else 0.0) for i in left}
        largest = max(values.values())
        limit = largest * (1 - TIE)
        best = min(i for i in left if values[i] >= limit)
        clear = min([clear, *(abs(value - limit) / largest for value in values.values() if largest > 0)])
        chosen.append(best)
    spoiled = [i for i in real if i not in fine]
    return sorted((chosen + spoiled)[:k]), clear
