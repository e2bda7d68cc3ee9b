"""Which tokens of one image survive, and what they become."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from gap_kernels import topk_indices
from torch import Tensor

from ..config import Stage, needs_grid
from ..strategies import QWEN
from ..strategies.by_features import BY_FEATURES
from ..vision.budget import budget_of
from ..vision.layout import Layout, layout_without_grid
from ..vision.needs import EARLIER_SCORES, MERGE_NEEDS, compares_entering
from ..vision.places import Places
from ..vision.select import Merging, choose_and_merge, with_merged
from ..vision_tower import TowerOutput
from .plan import Plan


class Encoded(NamedTuple):
    """An image of N tokens that was encoded.

    Attributes:
        features: [N, C], its tokens as the decoder gets them.
        tower: What was recorded of the tower's rows of this image, as far as its plan needs it.
    """

    features: Tensor
    tower: TowerOutput = TowerOutput()


def choose(plan: Plan, layout: Layout) -> Tensor | None:
    """Return the survivors of an image that isn't encoded yet, as far as they are known.

    Args:
        plan: How they are chosen.
        layout: Where its N tokens stand.

    Returns:
        [kept] int64 on the CPU, ascending; None where all survive, or where the image has to be encoded first.
    """
    if plan.kept >= layout.counts[0] or not plan.is_known:
        return None
    return _chosen(plan, layout, None, torch.device("cpu"))[0]


def survivors_by_view(plan: Plan, layout: Layout) -> list[int] | None:
    """Return how many tokens of each view of an image survive; None where the image has to be encoded first.

    Args:
        plan: How they are chosen.
        layout: Where its N tokens stand, each of them in a view.
    """
    if plan.kept >= layout.counts[0]:
        return [view.size for view in layout.views]
    index = choose(plan, layout)
    if index is not None:
        return [int(np.isin(view.numbers, index.numpy()).sum()) for view in layout.views]
    return list(budget_of(layout, plan.stage, None).views) if needs_grid(plan.stage) else None


def prune(plan: Plan, layout: Layout, encoded: Encoded) -> tuple[Tensor | None, Tensor]:
    """Return the survivors of an image, as in transformers those of the only image of a prompt.

    Args:
        plan: How they are chosen, and what the others are merged into.
        layout: Where its N tokens stand.
        encoded: What is known of them.

    Returns:
        [kept] int64, ascending, None where all survive; and [kept, C], their features.
    """
    features = encoded.features
    if plan.kept >= layout.counts[0]:
        return None, features
    # What is known before is chosen on the same device as then, so that ids and features agree.
    index = choose(plan, layout)
    if index is None:
        index, features = _chosen(plan, layout, encoded, features.device)
    index = index.to(features.device)
    return index, features[index]


def _chosen(
    plan: Plan, layout: Layout, encoded: Encoded | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The survivors, and the features of all tokens, some of them merged; empty where the image isn't encoded."""
    stage = plan.stage
    places = Places(layout if needs_grid(stage) else layout_without_grid(layout.counts), device)
    features, tower = Encoded(torch.empty(0)) if encoded is None else encoded
    merging = None if stage.merge == "none" else _merging(stage, features, tower)
    scores, beside = _scores(plan, places, tower), _beside(stage, places, features, tower)
    budget = budget_of(places.layout, stage, None)
    ranks, merged = choose_and_merge(places, scores, budget, stage, merging, beside)
    if merging is not None and merged:
        features = with_merged(merging, features[None], merged)[0]
    # In order, and without a read.
    return topk_indices(scores if ranks is None else ranks, plan.kept)[0], features


def _scores(plan: Plan, places: Places, tower: TowerOutput) -> Tensor:
    """[1, N] float32."""
    if plan.score == "random":
        return places.random(plan.seed)
    if plan.score == "spatial":
        return places.spatial()
    return places.at_features(getattr(tower, plan.score))


def _beside(stage: Stage, places: Places, features: Tensor, tower: TowerOutput) -> Tensor | None:
    """What the coverage looks at beside scores, [N, ...]; any rows at newlines of what comes from the tower."""
    earlier = EARLIER_SCORES.get((stage.coverage, stage.score))
    if earlier is not None:
        return places.at_features(tower.rows[earlier])[0]
    if stage.coverage not in BY_FEATURES:
        return None
    if tower.features is None or not compares_entering(stage):
        return features
    return places.at_features(tower.features)[0]


def _merging(stage: Stage, features: Tensor, tower: TowerOutput) -> Merging:
    before_projector = tower.features is not None and "features" in MERGE_NEEDS[stage.merge]
    rows = torch.arange(len(features), device=features.device)
    # The rule is of aggregation, which an engine does behind the projector alone.
    return Merging(stage.merge, features, rows, tower, before_projector, QWEN)
