"""Selection by rank within regions."""

from __future__ import annotations

import math


def worse(scores: list[float], i: int) -> tuple[bool, float, int]:
    """A key that is larger the worse entry i is: NaN, then low scores, then high indices."""
    return (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], i)


def needed(neighbours: list[list[int]], k: int) -> int:
    """How many of each region there must be for k in all, from neighbours that are mutual."""
    together = {frozenset([i, *(j for j in around if j >= 0)]) for i, around in enumerate(neighbours)}
    return max(1, math.ceil(k / max(1, len(together))))


def oracle(scores: list[float], neighbours: list[list[int]], per_region: int | None, k: int) -> list[int]:
    """Rank within regions, then take candidates and after them the others, best first."""
    if per_region is None:
        per_region = needed(neighbours, k)
    candidates, others = [], []
    for i, around in enumerate(neighbours):
        rank = sum(j >= 0 and worse(scores, j) < worse(scores, i) for j in around)
        (candidates if rank < per_region else others).append(i)
    candidates.sort(key=lambda i: worse(scores, i))
    others.sort(key=lambda i: worse(scores, i))
    return sorted((candidates + others)[:k])


def regions(grid: tuple[int, int], region: tuple[int, int]) -> list[list[int]]:
    """The cells of each region of a grid."""
    found = []
    for top in range(0, grid[0], region[0]):
        for left in range(0, grid[1], region[1]):
            rows = range(top, min(top + region[0], grid[0]))
            columns = range(left, min(left + region[1], grid[1]))
            found.append([row * grid[1] + column for row in rows for column in columns])
    return found
