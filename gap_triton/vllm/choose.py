"""Which tokens of one image survive."""

from __future__ import annotations

from typing import NamedTuple

import torch
from gap_kernels import topk_indices
from torch import Tensor

from ..config import needs_grid
from ..strategies.by_features import BY_FEATURES
from ..strategies.coverage import choose_on_grid
from ..vision.budget import budget_of
from ..vision.layout import Layout, layout_without_grid
from ..vision.needs import compares_entering
from ..vision.places import Places
from .plan import Plan


class Encoded(NamedTuple):
    """What is known of an image of N tokens once it is encoded.

    Attributes:
        features: [N, C], its tokens as the decoder gets them.
        score: [F] float32, what the tower says of its rows of this image; None where it isn't asked.
        entering: [F, C'], these rows as they enter the projector; None where that isn't asked for, or there is none.
        earlier: [F] float32, their score in an earlier layer; None where it isn't asked for.
    """

    features: Tensor
    score: Tensor | None = None
    entering: Tensor | None = None
    earlier: Tensor | None = None


def choose(
    plan: Plan, layout: Layout, encoded: Encoded | None = None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Return the survivors of an image, as they are chosen in transformers of the only image of a prompt.

    Args:
        plan: How they are chosen.
        layout: Where its N tokens stand.
        encoded: What is known of it; None before it is encoded.
        device: Where the result is.

    Returns:
        [kept] int64, ascending; None where all survive, or where nothing is known before the image is encoded.
    """
    if plan.kept >= layout.counts[0]:
        return None
    if plan.is_known:
        # Both the ids of a prompt and its features are chosen by it: on one device, so that they agree.
        return _chosen(plan, layout, None, torch.device("cpu")).to(device)
    return None if encoded is None else _chosen(plan, layout, encoded, encoded.features.device).to(device)


def _chosen(plan: Plan, layout: Layout, encoded: Encoded | None, device: torch.device) -> Tensor:
    stage = plan.stage
    places = Places(layout if needs_grid(stage) else layout_without_grid(layout.counts), device)
    scores = _scores(plan, places, encoded)  # [1, N]
    beside = None if encoded is None else _beside(plan, places, encoded)  # [N, C] or [N]
    if places.one_view_each():
        (view,) = places.layout.views
        in_view = None if beside is None else beside[None]
        return _on_grid(plan, scores, plan.kept, view.grid, in_view)[0]
    budget = budget_of(places.layout, stage, None)
    stays = places.stays(budget)
    for group in places.groups(budget.views):
        in_views = None if beside is None else group.at_slots(beside)
        index = _on_grid(plan, group.at_slots(scores.flatten()), group.keep, group.grid, in_views)
        stays.view(-1).scatter_(0, group.slots_at(index).flatten(), 1.0)
    return topk_indices(stays, plan.kept)[0]  # in order, and without a read


def _on_grid(plan: Plan, scores: Tensor, keep: int, grid: tuple[int, int], beside: Tensor | None) -> Tensor:
    return choose_on_grid(scores, keep, plan.coverage, grid, beside, exponent=plan.exponent)


def _scores(plan: Plan, places: Places, encoded: Encoded | None) -> Tensor:
    if plan.score == "random":
        return places.random(plan.seed)
    if plan.score == "spatial":
        return places.spatial()
    assert encoded is not None
    assert encoded.score is not None
    return places.at_features(encoded.score)


def _beside(plan: Plan, places: Places, encoded: Encoded) -> Tensor | None:
    """What the coverage looks at beside scores; any rows at newlines of what comes from the tower."""
    if plan.earlier is not None:
        assert encoded.earlier is not None
        return places.at_features(encoded.earlier)[0]
    if plan.coverage not in BY_FEATURES:
        return None
    if encoded.entering is None or not compares_entering(plan.stage):
        return encoded.features
    return places.at_features(encoded.entering)[0]
