"""The places of a layout's tokens on a device: index tensors, made once for all prompts with the same layout.

A *slot* is a visual token of a batch: token ``v`` of sample ``b`` is slot ``b * V + v``, with V the most visual tokens of a
sample. Slots don't depend on what stands around the image, as rows of the prompt do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gap_kernels import scatter_rows
from torch import Tensor

from ..host import to_device
from ..strategies import spatial_order
from ..strategies.draw import draw
from .budget import Budget, newlines_that_stay
from .layout import Layout

TokenIndex = Tensor | None
"""Int64 numbers of tokens; None = all of them in order, so that nothing has to be gathered."""


@dataclass(frozen=True)
class Group:
    """G views of one size, of which equally many tokens are kept.

    Attributes:
        grid: (H, W).
        keep: How many tokens of each view survive.
        views: Number of each view in the layout.
        slots: [G, N] int64, their slots.
        are_all: The slots are all there are, in order.
        features: [G, N], their rows of the tower's output.
    """

    grid: tuple[int, int]
    keep: int
    views: tuple[int, ...]
    slots: Tensor
    are_all: bool
    features: TokenIndex

    @property
    def size(self) -> tuple[int, int]:
        """(G, N)."""
        return len(self.views), self.grid[0] * self.grid[1]

    def at_slots(self, values: Tensor) -> Tensor:
        """Return [G, N, ...] of ``values`` [B * V, ...]."""
        return values.unflatten(0, self.size) if self.are_all else values[self.slots.to(values.device)]

    def at_features(self, values: Tensor) -> Tensor:
        """Return [G, N, ...] of ``values`` [F, ...], rows of the tower's output."""
        if self.features is not None:
            return values[self.features.to(values.device)]
        return values[: self.size[0] * self.size[1]].unflatten(0, self.size)

    def slots_at(self, index: Tensor) -> Tensor:
        """Return the slots [G, K] of tokens ``index`` [G, K] of the views."""
        return (
            index if self.are_all and len(self.views) == 1 else self.slots.to(index.device).gather(1, index)
        )


class Places:
    """Index tensors and constants of a layout on a device.

    Args:
        layout: The layout.
        device: Where they are to be.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.shape = (len(layout.counts), max(layout.counts, default=0))  # (B, V)

    def groups(self, shares: Sequence[int]) -> list[Group]:
        """Return the views of one size that keep equally many, together; ``shares`` is how many each keeps."""
        members: dict[tuple[tuple[int, int], int], list[int]] = {}
        for number, keep in enumerate(shares):
            if keep:
                members.setdefault((self.layout.views[number].grid, keep), []).append(number)
        return [self.group(grid, keep, views) for (grid, keep), views in members.items()]

    def group(self, grid: tuple[int, int], keep: int, views: Sequence[int]) -> Group:
        """Return the group of ``views``, all of size ``grid``."""
        views = tuple(views)
        return Group(grid, keep, views, *self._once(("group", views), lambda: self._indices_of(views)))

    def at_features(self, values: Tensor) -> Tensor:
        """Return [B, V, ...] of ``values`` [F, ...], rows of the tower's output; any one where a slot comes from none."""
        index: TokenIndex = self._once("features", self._features_of_slots)
        if index is None:
            return values[: self.shape[0] * self.shape[1]].unflatten(0, self.shape)
        return values[index.to(values.device)]

    def is_placed(self) -> Tensor | None:
        """Return [B, V] bool, False at newlines and filler; None where there are none."""
        return self._once("placed", self._placed)

    def has_newlines(self) -> bool:
        """Return whether some token is in no view."""
        return sum(view.size for view in self.layout.views) < sum(self.layout.counts)

    def one_view_each(self) -> bool:
        """Return whether each sample's visual tokens are those of one view at most."""
        samples = [view.sample for view in self.layout.views]
        return len(set(samples)) == len(samples) and not self.has_newlines()

    def unplaced_scores(self, budget: Budget) -> Tensor:
        """Return [B, V] float32: inf at the newlines that ``budget`` keeps, else -inf."""
        return self._once(
            ("unplaced", budget.newlines),
            lambda: self._on_device(np.where(self._stays(budget), np.float32(np.inf), np.float32(-np.inf))),
        )

    def stay(self, budget: Budget, slots: list[Tensor]) -> Tensor:
        """Return [B, V] float32: 1 at ``slots``, vectors of int64, and at the newlines that ``budget`` keeps, else 0."""

        def newlines() -> Tensor:
            return self._once(
                ("stays", budget.newlines), lambda: self._on_device(self._stays(budget).astype(np.float32))
            )

        if not slots:
            return newlines()
        index = joined(slots)
        ones = self._once(
            ("ones", len(index)),
            lambda: torch.ones(1, len(index), 1, dtype=torch.float32, device=self.device),
        )
        base = newlines().view(1, -1, 1) if any(budget.newlines) else None
        return scatter_rows(ones, index[None], self.shape[0] * self.shape[1], base=base).view(self.shape)

    def spatial(self) -> Tensor:
        """Return [B, V] float32, the score of an even spread over each view."""
        return self._once("spatial", self._spread)

    def random(self, seed: int) -> Tensor:
        """Return [B, V] float32, the draw of a sample's first, second, ... visual token."""
        batch, tokens = self.shape
        return self._once(
            ("random", seed),
            lambda: to_device(draw(seed, 0, tokens).expand(batch, -1).contiguous(), self.device),
        )

    def sample_starts(self, queries: int) -> Tensor:
        """Return [B, 1] int64, the number of the first row of each sample, if all rows of a batch are counted."""
        starts = [sample * queries for sample in range(self.shape[0])]
        return self._once(("starts", queries), lambda: to_device(starts, self.device)[:, None])

    def _once(self, key: Any, make: Any) -> Any:
        return self.layout.constants.get((key, self.device), self.device, make)

    def _on_device(self, values: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(values), self.device)

    def _indices_of(self, views: tuple[int, ...]) -> tuple[Tensor, bool, TokenIndex]:
        members = [self.layout.views[number] for number in views]
        slots = np.stack([view.numbers + view.sample * self.shape[1] for view in members])
        features = np.stack([view.features for view in members])
        are_all = slots.size == self.shape[0] * self.shape[1] and _in_order(slots)
        return self._on_device(slots), are_all, self._unless_in_order(features)

    def _unless_in_order(self, index: np.ndarray) -> TokenIndex:
        return None if _in_order(index) else self._on_device(index)

    def _features_of_slots(self) -> TokenIndex:
        features = np.zeros(self.shape, dtype=np.int64)
        for view in self.layout.views:
            features[view.sample, view.numbers] = view.features
        return self._unless_in_order(features)

    def _placed(self) -> Tensor | None:
        if not self.has_newlines() and min(self.layout.counts) == self.shape[1]:
            return None
        placed = np.zeros(self.shape, dtype=bool)
        for view in self.layout.views:
            placed[view.sample, view.numbers] = True
        return self._on_device(placed)

    def _stays(self, budget: Budget) -> np.ndarray:
        return newlines_that_stay(self.layout.unplaced(), budget)

    def _spread(self) -> Tensor:
        score = torch.zeros(self.shape, dtype=torch.float32)
        for view in self.layout.views:
            score[view.sample, torch.from_numpy(view.numbers)] = -spatial_order(
                view.grid, device="cpu"
            ).float()
        return to_device(score, self.device)


def joined(parts: list[Tensor]) -> Tensor:
    """Return tensors one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _in_order(index: np.ndarray) -> bool:
    return bool((index.ravel() == np.arange(index.size)).all())
