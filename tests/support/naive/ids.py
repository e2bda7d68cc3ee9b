"""Position ids of survivors, as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def stretched(numbers: Sequence[int], visual: Sequence[bool], rows: Sequence[int]) -> list[int]:
    """RPME, Algorithm 3 of Nüwa, for each run of visual tokens: the ids of ``rows``.

    ``numbers`` and ``visual`` are of all tokens, ``rows`` those that survive.
    """
    runs: list[list[int]] = [[]]
    for row, is_visual in enumerate(visual):
        if is_visual:
            runs[-1].append(row)
        else:
            runs.append([])
    ids = {row: numbers[row] for row in rows}
    for run in filter(None, runs):
        start, end = min(numbers[row] for row in run), max(numbers[row] for row in run)
        distances = {row: numbers[row] - start for row in run if row in ids}
        most = max(distances.values(), default=0)
        for row, distance in distances.items():
            ids[row] = math.ceil(Fraction(distance * (end - start), most)) + start if most else start
    return [ids[row] for row in rows]
