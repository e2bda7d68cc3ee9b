"""What is chosen and what is merged, as loops over rows."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from gap_triton.strategies import Merged, spatial_order

from . import greedy
from .select import fill as fill


def ranked(scores: list[float]) -> list[int]:
    """All rows, best first; ties to the lower row, NaN as -inf."""
    keys = [(math.inf if math.isnan(score) else -score, row) for row, score in enumerate(scores)]
    return [row for _, row in sorted(keys)]


def chosen_topk(scores: list[float], keep: int) -> list[int]:
    return ranked(scores)[:keep]


def chosen_by_region(
    scores: list[float], grid: tuple[int, int], keep: int, per_region: int | None
) -> list[int]:
    """The best of the candidates, then the best of the rest, from cells and their 2 x 2 regions."""
    regions: dict[tuple[int, int], list[int]] = {}
    place = {row: number for number, row in enumerate(ranked(scores))}
    for cell in range(len(scores)):
        regions.setdefault((cell // grid[1] // 2, cell % grid[1] // 2), []).append(cell)
    if per_region is None:
        per_region = max(1, math.ceil(keep / len(regions)))
    candidates = {cell for cells in regions.values() for cell in sorted(cells, key=place.get)[:per_region]}
    return sorted(place, key=lambda cell: (cell not in candidates, place[cell]))[:keep]


def chosen_by_stride(
    scores: list[float], order: list[int], keep: int, spread: float | None = None
) -> list[int]:
    share = Fraction(3, 10) if spread is None else Fraction(str(spread))
    lattice = sorted(range(len(scores)), key=lambda row: (order[row], row))[: int(keep * share)]
    others = [row for row in ranked(scores) if row not in lattice]
    return lattice + others[: keep - len(lattice)]


def expected_choice(
    coverage: str,
    scores: list[float],
    grid: tuple[int, int],
    keep: int,
    per_region: int | None,
    spread: float | None = None,
) -> list[int]:
    if coverage == "topk":
        return chosen_topk(scores, keep)
    if coverage == "region":
        return chosen_by_region(scores, grid, keep, per_region)
    return chosen_by_stride(scores, spatial_order(grid).tolist(), keep, spread)


def cosine(left: Tensor, right: Tensor) -> float:
    lengths = float(left.norm() * right.norm())
    return float(left @ right) / lengths if lengths else 0.0


def scaled(scores: list[float]) -> list[float]:
    """To 0..1 as CDPruner does; what is infinite or NaN stays so."""
    finite = [score for score in scores if math.isfinite(score)] or [0.0]
    least, most = min(finite), max(finite)
    return [(score - least + 1e-6) / max(most - least, 1e-6) for score in scores]


def raised(scores: list[float]) -> list[float]:
    """By the same for all, so that none is below 0."""
    least = min([0.0, *filter(math.isfinite, scores)])
    return [score - least for score in scores]


def chosen_greedily(
    coverage: str, scores: list[float], features: Tensor, keep: int, exponent: float = 1.0
) -> tuple[list[int], float]:
    """One after another, and how clear that is, see `support.naive.greedy`."""
    weight = {"max_min": None, "determinant": scaled(scores), "coverage_gain": raised(scores)}[coverage]
    return greedy.oracle(features, keep, coverage, weight, exponent)


def chosen_least_similar(scores: list[float], features: Tensor, keep: int) -> list[int]:
    """Pivots, and for each in turn its part of the rest: the rows that are least like it."""
    pivots = sorted(ranked(scores)[: min(keep, 4)])
    chosen, rest = list(pivots), keep - len(pivots)
    for number, pivot in enumerate(pivots):
        others = [row for row in range(len(scores)) if row not in chosen]
        others.sort(key=lambda row: (cosine(features[pivot], features[row]), row))
        chosen += others[: rest * (number + 1) // 4 - rest * number // 4]
    return chosen


def chosen_distinct(scores: list[float], features: Tensor, keep: int) -> list[int]:
    """A half by score; the others are dealt into two halves until those most like one of the other half are gone."""
    order = ranked(scores)
    best, others = order[: keep // 2], order[keep // 2 :]
    while len(others) > keep - len(best) > 0:
        first, second = others[::2], others[1::2]
        alike = {row: max(cosine(features[row], features[other]) for other in second) for row in first}
        gone = min(8, len(others) - (keep - len(best)), len(first))
        others = sorted(first, key=lambda row: -alike[row])[gone:] + second
    return best + others[: keep - len(best)]


def expect(merged: Merged, tokens: list[dict[int, Tensor]], tolerance: float = 1e-5) -> None:
    """Compare with one dictionary of features by row for each grid."""
    length = merged.index.shape[1]
    assert merged.index.dtype == torch.int64
    assert merged.index.tolist() == [fill(list(rows), length) for rows in tokens]
    for found, index, rows in zip(merged.features.double(), merged.index.tolist(), tokens, strict=True):
        for feature, row in zip(found, index, strict=True):
            wanted = rows[row] if row >= 0 else torch.zeros_like(feature)
            torch.testing.assert_close(feature, wanted, rtol=tolerance, atol=tolerance)


def averaged(features: Tensor, scores: list[float], kept: list[int]) -> dict[int, Tensor]:
    features = features.double()
    tokens = {row: features[row] for row in kept}
    dropped = [row for row in ranked(scores) if row not in kept]
    if dropped:
        tokens[dropped[0]] = sum(features[row] for row in dropped) / len(dropped)
    return tokens


def collected_nearest(
    features: Tensor, keys: Tensor, scores: list[float], kept: list[int]
) -> dict[int, Tensor]:
    features, keys = features.double(), keys.double()
    weights = [score if math.isfinite(score) else 0.0 for score in scores]
    dropped = [row for row in ranked(scores) if row not in kept]
    if len(dropped) <= 1:
        return {row: features[row] for row in [*kept, *dropped]}
    tokens = {}
    for row in kept:
        others = [other for other in range(len(scores)) if other != row]
        others.sort(key=lambda other: (-cosine(keys[row], keys[other]), other))
        tokens[row] = features[row] + sum(weights[other] * features[other] for other in others[:32])
    tokens[dropped[0]] = sum(weights[row] * features[row] for row in dropped)
    return tokens


def gathered_contextual(features: Tensor, keys: Tensor, kept: list[int], count: int) -> dict[int, Tensor]:
    features, keys = features.double(), keys.double()
    left = [row for row in range(len(features)) if row not in kept]
    step = max(1, len(left) // max(count, 1))
    targets = left[::step][:count]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for row in left:
        if targets and row not in targets:
            # `max` takes the first of equal ones.
            groups[max(targets, key=lambda target: cosine(keys[row], keys[target]))].append(row)
    tokens = {row: features[row] for row in kept}
    for target, group in groups.items():
        mean = sum(features[row] for row in group) / len(group) if group else 0.0
        tokens[target] = features[target] + mean
    return tokens


def chosen_with_neighbours(
    scores: list[float], earlier: list[float], keep: int, grid: tuple[int, int]
) -> list[int]:
    """Anchors by the earlier scores, what is beside, above and below them, and the best of the rest."""
    chosen: set[int] = set()
    for anchor in ranked(earlier)[: round(keep / 50)]:
        down, right = divmod(anchor, grid[1])
        for row, column in (
            *((down, right), (down - 1, right), (down + 1, right)),
            *((down, right - 1), (down, right + 1)),
        ):
            if 0 <= row < grid[0] and 0 <= column < grid[1]:
                chosen.add(row * grid[1] + column)
    rest = [row for row in ranked(scores) if row not in chosen]
    return [*chosen, *rest[: keep - len(chosen)]]


def chosen_by_windows(
    scores: list[float], earlier: list[float], keep: int, grid: tuple[int, int]
) -> list[int]:
    """A half by the earlier scores, no more of any of 4 x 4 windows than suffices, and the best of the rest."""
    windows = [(row // grid[1] * 4 // grid[0], row % grid[1] * 4 // grid[1]) for row in range(len(scores))]
    local = keep // 2
    most = math.ceil(local / len(set(windows)))
    taken: dict[tuple[int, int], int] = {}
    chosen: list[int] = []
    passed: list[int] = []
    for row in ranked(earlier):
        if taken.get(windows[row], 0) < most:
            taken[windows[row]] = taken.get(windows[row], 0) + 1
            chosen.append(row)
        else:
            passed.append(row)
    chosen = [*chosen, *sorted(passed)][:local]  # windows may be too small, on odd grids
    rest = [row for row in ranked(scores) if row not in chosen]
    return [*chosen, *rest[: keep - local]]


def clustered(features: Tensor, kept: list[int]) -> dict[int, Tensor]:
    """Each kept row with all that are most like it, in the mean."""
    features = features.double()
    groups = {row: [features[row]] for row in kept}
    for row in range(len(features)):
        if row not in kept and kept:
            groups[max(kept, key=lambda own: cosine(features[row], features[own]))].append(features[row])
    return {row: sum(group) / len(group) for row, group in groups.items()}
