"""Which rows survive, and what becomes of them."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from gap_kernels import PrunedTokens
from torch import Tensor

from . import region


def oracle(
    scores: list[list[float]],
    visual_index: list[list[int]],
    keep: list[int],
    num_rows: int,
    mask: list[list[bool]] | None = None,
    neighbours: list[list[list[int]]] | None = None,
    per_region: int | None = None,
    order: list[list[int]] | None = None,
    spread: float | None = None,
) -> list[list[int]]:
    """The surviving rows of each sample, without filler: by region with ``neighbours``, by stride with ``order``."""
    survivors = []
    for b, positions in enumerate(visual_index):
        real = [True] * num_rows if mask is None else mask[b]
        slots = [slot for slot, p in enumerate(positions) if p >= 0 and real[p]]
        slots.sort(key=lambda slot: positions[slot])
        count = min(keep[b], len(slots))
        of_slots = [scores[b][slot] for slot in slots]
        best = sorted(range(len(slots)), key=lambda i: region.worse(of_slots, i))
        if neighbours is not None:
            around = [
                [slots.index(other) for other in neighbours[b][slot] if other in slots] for slot in slots
            ]
            best = region.oracle(of_slots, around, per_region, count)
        elif order is not None:
            ranks = [math.inf if order[b][slot] < 0 else order[b][slot] for slot in slots]
            share = Fraction(3, 10) if spread is None else Fraction(str(spread))
            sample = sorted(best, key=lambda i: (ranks[i], i))[: int(count * share)]
            best = sample + [i for i in best if i not in sample]
        stays = {positions[slots[i]] for i in best[:count]}
        stays |= {row for row in range(num_rows) if real[row] and row not in positions}
        stays.add(num_rows - 1)
        survivors.append(sorted(stays))
    return survivors


def check_rows(pruned: PrunedTokens, rows: dict[str, Tensor], expected: list[list[int]], length: int) -> None:
    """Every output equals its source row by row; filler is on the left and a copy of row 0."""
    index = [[-1] * (length - len(row)) + row for row in expected]
    assert pruned.index.tolist() == index
    assert pruned.index.dtype == torch.int64
    for name, source in rows.items():
        output = getattr(pruned, name)
        assert output.dtype == source.dtype
        for b, row in enumerate(index):
            for j, i in enumerate(row):
                if source.dim() == 3 and name == "position_ids":
                    assert torch.equal(output[:, b, j], source[:, b, max(i, 0)])
                else:
                    assert torch.equal(output[b, j], source[b, max(i, 0)])
