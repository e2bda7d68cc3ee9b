"""Two ways to prune on the same scenes, as the tables compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .intervals import paired_difference
from .table import IOU_THRESHOLD, Row


@dataclass(frozen=True)
class Comparison:
    """Accuracy of one way minus that of another, at one budget.

    Attributes:
        model: The embedded model.
        keep: The budget of both.
        method: The one.
        ids: Its position ids.
        against: The other.
        against_ids: Its position ids.
        value: Accuracy of the one minus that of the other.
        low: Lower end of the 95% interval (Newcombe, paired).
        high: Upper end.
        first_only: Scenes that only the one answers right.
        second_only: Scenes that only the other answers right.
    """

    model: str
    keep: float | int
    method: str
    ids: str
    against: str
    against_ids: str
    value: float
    low: float
    high: float
    first_only: int
    second_only: int

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as it stands in the results file."""
        return asdict(self)


def compare(rows: Sequence[Row], ious: Sequence[Tensor], baseline: Callable[[Row], str]) -> list[Comparison]:
    """Compare every row with kept ids to the same with compacted ids, and to a baseline with kept ids.

    Args:
        rows: Of one model.
        ious: By row, [N] IoU of each answer, scenes in the same order.
        baseline: By row, the method to compare it with besides.

    Returns:
        A comparison with each of the two that ``rows`` hold.
    """
    right = {
        (row.method, row.keep, row.ids): iou >= IOU_THRESHOLD for row, iou in zip(rows, ious, strict=True)
    }
    comparisons = []
    for row in rows:
        if row.ids != "kept":
            continue
        for method, ids in ((row.method, "compacted"), (baseline(row), "kept")):
            other = right.get((method, row.keep, ids))
            if other is None or (method, ids) == (row.method, row.ids):
                continue
            difference = paired_difference(right[row.method, row.keep, row.ids], other)
            comparisons.append(
                Comparison(row.model, row.keep, row.method, row.ids, method, ids, **asdict(difference))
            )
    return comparisons
