"""Figures of papers, to stand beside what is measured: whose, on what, and where they are printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GAP, NUWA = "GAP, arXiv 2506.21873, abstract", "Nüwa, arXiv 2602.02951, main table"
LLAVA_7B = "LLaVA-1.5-7B"


@dataclass(frozen=True)
class Reported:
    """One figure of a paper.

    Attributes:
        data: Name of the data set.
        split: What the paper calls the split; "" where it names none.
        method: Name of the preset; ``"unpruned"``; or ``"pruned"`` where it is one of several.
        budget: Visual tokens on average; None = all, or not stated.
        ids: Position ids of the survivors.
        accuracy: Share of answers with IoU >= 0.5, in percent.
        unpruned: The same paper's without pruning.
        source: Paper and place.
        model: Of the paper.
    """

    data: str
    split: str
    method: str
    budget: int | None
    ids: str
    accuracy: float
    unpruned: float
    source: str
    model: str = LLAVA_7B

    def as_dict(self) -> dict[str, Any]:
        """Return the figure as it stands in the results file."""
        return asdict(self)


_NUWA_COLUMNS = (("refcoco", "test"), ("refcoco+", "testA"), ("refcoco+", "testB"), ("refcocog", ""))
_NUWA_ROWS: dict[int | None, tuple[float, ...]] = {
    None: (58.30, 59.43, 38.88, 48.50),
    192: (47.91, 43.18, 31.86, 37.64),
    128: (45.09, 42.63, 28.98, 36.59),
    64: (29.43, 28.22, 17.47, 21.81),
}

REPORTED = (
    Reported("refcoco", "val", "unpruned", None, "kept", 56.14, 56.14, GAP),
    Reported("refcoco", "val", "pruned", None, "compacted", 15.34, 56.14, GAP),
    Reported("refcoco", "val", "pruned", None, "kept", 51.42, 56.14, GAP),
    *(
        Reported(
            *column,
            method="unpruned" if budget is None else "nuwa",
            budget=budget,
            ids="kept",
            accuracy=accuracy,
            unpruned=full,
            source=NUWA,
        )
        for budget, accuracies in _NUWA_ROWS.items()
        for column, accuracy, full in zip(_NUWA_COLUMNS, accuracies, _NUWA_ROWS[None], strict=True)
    ),
)


def reported_for(data: str, split: str, model_type: str) -> list[Reported]:
    """Return the figures for a split and the kind of model; all are of LLaVA-1.5, so other models have none."""
    if model_type != "llava":
        return []
    return [each for each in REPORTED if each.data == data and each.split in (split, "")]
