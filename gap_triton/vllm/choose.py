"""Which tokens of one image survive."""

from __future__ import annotations

import torch
from gap_kernels import topk_indices
from torch import Tensor

from ..config import BEFORE_THE_DECODER, Stage, needs_grid
from ..strategies.coverage import choose_on_grid
from ..vision.budget import budget_of
from ..vision.layout import Layout, layout_without_grid
from ..vision.places import Places
from .plan import Plan


def choose(
    plan: Plan, layout: Layout, score: Tensor | None = None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Return the survivors of an image, as they are chosen in transformers of the only image of a prompt.

    Args:
        plan: How they are chosen.
        layout: Where its N tokens stand.
        score: [F] float32, what the tower says of its rows of this image; None before it ran, or where it isn't asked.
        device: Where the result is, if the tower isn't asked.

    Returns:
        [kept] int64, ascending; None where all survive, or where nothing is known before the tower ran.
    """
    if plan.kept >= layout.counts[0]:
        return None
    if plan.is_known:
        # Both the ids of a prompt and its features are chosen by it: on one device, so that they agree.
        return _chosen(plan, layout, None, torch.device("cpu")).to(device)
    return None if score is None else _chosen(plan, layout, score, score.device)


def _chosen(plan: Plan, layout: Layout, score: Tensor | None, device: torch.device) -> Tensor:
    stage = Stage(keep=plan.kept, layer=BEFORE_THE_DECODER, score=plan.score, coverage=plan.coverage)  # type: ignore[arg-type]
    places = Places(layout if needs_grid(stage) else layout_without_grid(layout.counts), device)
    if score is not None:
        scores = places.at_features(score)
    else:
        scores = places.random(plan.seed) if plan.score == "random" else places.spatial()
    if places.one_view_each():
        return choose_on_grid(scores, plan.kept, plan.coverage, places.layout.views[0].grid)[0]
    budget = budget_of(places.layout, stage, None)
    stays = places.stays(budget)
    for group in places.groups(budget.views):
        index = choose_on_grid(group.at_slots(scores.flatten()), group.keep, plan.coverage, group.grid)
        stays.view(-1).scatter_(0, group.slots_at(index).flatten(), 1.0)
    return topk_indices(stays, plan.kept)[0]  # in order, and without a read
