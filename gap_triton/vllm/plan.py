"""What is to be kept of one image, as a row of numbers: so it travels from the processor to the model."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import BEFORE_THE_DECODER, VISION_SCORES, Ids, Merge, Stage
from ..strategies import Coverage
from ..strategies.by_features import BY_FEATURES
from .options import COVERAGES, IDS, MERGES, Options

FIELDS = {"image": "gap_plan", "video": "gap_video_plan"}
"""Names of the multimodal fields of images and of videos: [images, 7] int64."""


class Plan(NamedTuple):
    """How the survivors of one image are chosen, and numbered.

    Attributes:
        kept: How many there are.
        score: One of `VISION_SCORES`.
        coverage: One of `COVERAGES`.
        ids: One of `IDS`.
        seed: Of ``score="random"``.
        exponent: Power of the scores, of coverages that weigh by them.
        merge: One of `MERGES`.
    """

    kept: int
    score: str
    coverage: Coverage
    ids: Ids
    seed: int
    exponent: float = 1.0
    merge: Merge = "none"

    @property
    def is_known(self) -> bool:
        """Whether the survivors are known without a look at the image."""
        looks_not = self.score in ("spatial", "random") and self.coverage not in BY_FEATURES
        return looks_not and self.merge == "none"

    @property
    def stage(self) -> Stage:
        """The same as a stage of `GapConfig`."""
        return Stage(
            keep=self.kept,
            layer=BEFORE_THE_DECODER,
            score=self.score,  # type: ignore[arg-type]
            coverage=self.coverage,
            exponent=self.exponent,
            merge=self.merge,
        )


def rows_of(options: Options, tokens: Sequence[int]) -> Tensor:
    """Return the plans of images of so many tokens: [images, 7] int64."""
    config = options.config
    how = [VISION_SCORES.index(config.score), COVERAGES.index(config.coverage), IDS.index(config.ids)]
    (bits,) = struct.unpack("q", struct.pack("d", config.exponent))  # a float in a row of whole numbers
    last = [config.seed, bits, MERGES.index(config.merge)]
    return torch.tensor([[options.kept(n), *how, *last] for n in tokens], dtype=torch.int64)


def plans_of(rows: Tensor) -> list[Plan]:
    """Return the plans in ``rows`` [images, 7] or [7] int64, on the CPU."""
    return [
        Plan(
            kept,
            VISION_SCORES[score],
            COVERAGES[coverage],
            IDS[ids],
            seed,
            struct.unpack("d", struct.pack("q", bits))[0],
            MERGES[merge],
        )
        for kept, score, coverage, ids, seed, bits, merge in rows.reshape(-1, len(Plan._fields)).tolist()
    ]


def shortened(tokens: Sequence[int], stands_for: Sequence[bool], rows: Sequence[int]) -> list[int]:
    """Return ``tokens`` with fewer placeholders.

    Args:
        tokens: What an image becomes in a prompt: runs of placeholders, between which there may be text.
        stands_for: Whether each is a placeholder.
        rows: How many of each run stay.
    """
    runs = [
        (place, list(run))
        for place, run in groupby(zip(tokens, stands_for, strict=True), lambda pair: pair[1])
    ]
    if sum(place for place, _ in runs) != len(rows):
        raise ValueError(
            f"an image has {sum(place for place, _ in runs)} runs of placeholders: expected {len(rows)}"
        )
    counts, found = iter(rows), []
    for place, run in runs:
        found += [token for token, _ in (run[: next(counts)] if place else run)]
    return found
