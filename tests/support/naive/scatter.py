"""Putting rows among others, one after another."""

from __future__ import annotations

from torch import Tensor


def scattered(
    values: Tensor, index: Tensor, num_rows: int, among: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """Result [B, Q, C] from the definition."""
    result = values.new_zeros(values.shape[0], num_rows, values.shape[2]) if base is None else base.clone()
    for sample, line in enumerate(index.tolist()):
        for slot, place in enumerate(line):
            if place >= 0 and among is not None:
                place = int(among[sample, place])
            if place >= 0:
                result[sample, place] = values[sample, slot]
    return result
