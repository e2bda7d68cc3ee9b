"""Which rows survive, and what becomes of them."""

from __future__ import annotations

import math

import torch
from gap_kernels import PrunedTokens
from torch import Tensor


def oracle(
    scores: list[list[float]],
    visual_index: list[list[int]],
    keep: list[int],
    num_rows: int,
    mask: list[list[bool]] | None = None,
) -> list[list[int]]:
    """The surviving rows of each sample, without filler."""
    survivors = []
    for b, positions in enumerate(visual_index):
        real = [True] * num_rows if mask is None else mask[b]
        candidates = [(p, s) for p, s in zip(positions, scores[b], strict=True) if p >= 0 and real[p]]
        best = sorted(candidates, key=lambda c: (math.isnan(c[1]), 0 if math.isnan(c[1]) else -c[1], c[0]))
        stays = {p for p, _ in best[: keep[b]]}
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
