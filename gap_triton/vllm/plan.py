"""What is to be kept of one image, as a row of numbers: so it travels from the processor to the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import VISION_SCORES, Ids
from ..strategies import Coverage
from .options import COVERAGES, IDS, Options

FIELD = "gap_plan"
"""Name of the multimodal field: [images, 5] int64."""


class Plan(NamedTuple):
    """How the survivors of one image are chosen, and numbered.

    Attributes:
        kept: How many there are.
        score: One of `VISION_SCORES`.
        coverage: One of `COVERAGES`.
        ids: One of `IDS`.
        seed: Of ``score="random"``.
    """

    kept: int
    score: str
    coverage: Coverage
    ids: Ids
    seed: int

    @property
    def is_known(self) -> bool:
        """Whether the survivors are known without a look at the image."""
        return self.score in ("spatial", "random")


def rows_of(options: Options, tokens: Sequence[int]) -> Tensor:
    """Return the plans of images of so many tokens: [images, 5] int64."""
    config = options.config
    how = [VISION_SCORES.index(config.score), COVERAGES.index(config.coverage), IDS.index(config.ids)]
    return torch.tensor([[options.kept(n), *how, config.seed] for n in tokens], dtype=torch.int64)


def plans_of(rows: Tensor) -> list[Plan]:
    """Return the plans in ``rows`` [images, 5] or [5] int64, on the CPU."""
    return [
        Plan(kept, VISION_SCORES[score], COVERAGES[coverage], IDS[ids], seed)
        for kept, score, coverage, ids, seed in rows.reshape(-1, len(Plan._fields)).tolist()
    ]
