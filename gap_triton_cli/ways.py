"""How ``gap-triton eval`` prunes on a data set, as the options say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from .choices import Score
from .parse import parse_keep, split, split_names

if TYPE_CHECKING:
    from gap_triton.evaluation.ways import Way


@dataclass(frozen=True)
class Ways:
    """What the options say of pruning on a data set."""

    methods: str | None
    budgets: str
    ids: str
    layer: int | None
    score: Score | None

    def of(self, model: Any) -> list[Way]:
        """Return the ways to run ``model``, or any model: None.

        Raises:
            ValueError: A value is out of range, or does not go with this model.
        """
        from gap_triton.evaluation.ways import ways_of
        from gap_triton.presets import PRESETS

        axes = {
            name: value for name, value in (("layer", self.layer), ("score", self.score)) if value is not None
        }
        if self.methods is not None and axes:
            raise typer.BadParameter(f"--{next(iter(axes))} is part of a method: leave it out, or --method")
        names: list[str | None] = [None]
        if self.methods is not None:
            names = list(split_names("--methods", self.methods, PRESETS))
        return ways_of(model, names, budgets_of(self.budgets), split(self.ids), **axes)


def budgets_of(text: str) -> list[float | int]:
    """Read ``--budgets``; without one that drops nothing."""
    shares = [parse_keep(item, "--budgets") for item in split(text)]
    if any(isinstance(share, float) and share == 1.0 for share in shares):
        raise typer.BadParameter("--budgets 1.0 drops nothing; no pruning is always the first row")
    return shares
