"""Merging tokens by the cosines of their keys, in loops over float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .strategies import cosine


def collected(
    features: Tensor, keys: Tensor, weights: list[float], kept: list[int], count: int
) -> list[Tensor]:
    """One sample of `gap_kernels.collect_nearest`; -1 in ``kept`` is filler."""
    features, keys = features.double(), keys.double()
    weights = [weight if math.isfinite(weight) else 0.0 for weight in weights]
    nothing = torch.zeros(features.shape[1], dtype=torch.float64)
    rows = []
    for own in kept:
        others = [other for other in range(len(features)) if other != own and own >= 0]
        alike = {other: cosine(keys[own], keys[other]) for other in others}
        others = sorted(
            (other for other in others if not math.isnan(alike[other])), key=lambda j: (-alike[j], j)
        )
        taken = [weights[other] * features[other] for other in others[:count]]
        rows.append(sum(taken, features[own]) if own >= 0 else nothing)
    dropped = [row for row in range(len(features)) if row not in kept]
    return [*rows, sum((weights[row] * features[row] for row in dropped), nothing)]


def merged(
    features: Tensor, keys: Tensor, targets: list[int], excluded: list[int], average: bool
) -> list[Tensor]:
    """One sample of `gap_kernels.merge_nearest`; -1 in ``targets`` is filler."""
    features, keys = features.double(), keys.double()
    groups: dict[int, list[Tensor]] = {target: [] for target in targets if target >= 0}
    for row in range(len(features)):
        if groups and row not in groups and row not in excluded:
            alike = {target: cosine(keys[row], keys[target]) for target in groups}
            best = max(groups, key=lambda target: -2.0 if math.isnan(alike[target]) else alike[target])
            groups[best].append(features[row])
    nothing = torch.zeros(features.shape[1], dtype=torch.float64)

    def row_of(target: int) -> Tensor:
        if target < 0:
            return nothing
        own, group = features[target], groups[target]
        if average:
            return (own + sum(group)) / (1 + len(group))
        return own + (sum(group) / len(group) if group else 0.0)

    return [row_of(target) for target in targets]
