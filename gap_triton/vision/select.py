"""Selecting visual tokens after the vision encoder, right before the decoder.

The prompt is complete here: the model has numbered, masked and embedded all of it. What is not selected is dropped before
the first decoder layer. So all other tokens keep the ids that they have without pruning, and no key of a dropped token is
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gap_kernels import grid_neighbours
from transformers import PreTrainedModel

from ..attachment import Attachment
from ..config import Merge, Stage, needs_grid
from ..state import ForwardState, Prompt, VisionSelection
from ..strategies import (
    LLAVA,
    LLAVA_NEXT,
    QWEN,
    AggregationRule,
    Merged,
    aggregate,
    average,
    choose,
    contextual,
    contextual_count,
    nearest,
    spatial_order,
    text_similarity,
)
from ..strategies.draw import draw
from ..strategies.rows import positions_first
from ..vision_tower import Need, TowerOutput
from ..vision_tower.finding import packs
from .budget import budget_of, newlines_that_stay
from .layout import Layout, View, layout_of

Kwargs = dict[str, Any]


TOLERANCE = 1e-2  # relative; a model that changes the output of its projector changes it by more


@dataclass(frozen=True)
class Grids:
    """G views of one size, of which equally many tokens are kept.

    Attributes:
        grid: (H, W).
        keep: How many tokens of each view survive.
        sample: Row of the batch of each.
        rows: [G, N] int64, rows of the prompt.
        features: [G, N] int64, rows of the tower's output.
        score: [G, N] float32.
    """

    grid: tuple[int, int]
    keep: int
    sample: tuple[int, ...]
    rows: torch.Tensor
    features: torch.Tensor
    score: torch.Tensor

    def samples_on(self, device: torch.device) -> torch.Tensor:
        """Return [G, 1] int64 on ``device``, `sample`."""
        return torch.tensor(self.sample, device=device)[:, None]


@dataclass(frozen=True)
class Merging:
    """How tokens that are not chosen are merged into those that are.

    Attributes:
        merge: The method.
        embeds: [B, Q, C], what the decoder gets without it.
        tower: What the vision tower computed.
        before_projector: Tokens are merged as they enter the projector, which then maps what they make; else as the decoder
            gets them.
        rule: Constants of ``merge="aggregation"``.
    """

    merge: Merge
    embeds: torch.Tensor
    tower: TowerOutput
    before_projector: bool
    rule: AggregationRule


def select_before_decoder(
    state: ForwardState, prompt: Prompt, stage: Stage, kwargs: Kwargs
) -> tuple[VisionSelection, Kwargs]:
    """Choose, and merge what is not chosen.

    Args:
        state: The running forward.
        prompt: The prompt.
        stage: How.
        kwargs: Keyword arguments of the decoder, with ``inputs_embeds`` [B, Q, C].

    Returns:
        What survives; and the keyword arguments, with merged tokens in the place of the survivors that took them in.

    Raises:
        ValueError: The score or the merge needs something that this prompt or this model does not have.
    """
    layout = _layout(state, prompt, stage)
    tower = TowerOutput() if state.recorder is None else state.recorder.output()
    merging = None if stage.merge == "none" else _merging(state.attachment, stage, layout, tower, kwargs)
    _refuse_other_images(state.attachment.owner, layout, tower)
    scores = _scores(state, prompt, stage, layout.views, tower, kwargs)
    budget = budget_of(layout.views, scores, stage, prompt.visual_counts)
    stays = newlines_that_stay(layout.unplaced, budget)
    by_row = torch.where(stays, torch.inf, -torch.inf).to(torch.float32)
    for view, score in zip(layout.views, scores, strict=True):
        by_row[view.sample, view.rows] = score
    keep = list(budget.newlines)
    merged: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # samples, rows, embeddings
    for grids in _grouped(layout.views, scores, budget.views):
        samples = grids.samples_on(prompt.visual.device)
        index, embeds = _survivors_of(grids, stage, merging)
        rows = grids.rows.gather(1, index)
        stays[samples, rows] = True
        if embeds is not None:
            merged.append((samples, rows, embeds))
        for sample in grids.sample:
            keep[sample] += grids.keep
    if merged:
        kwargs = {**kwargs, "inputs_embeds": _with_merged(kwargs["inputs_embeds"], merged)}
    rows, real = prompt.visual_index.clamp(min=0), prompt.visual_index >= 0
    score = torch.where(real, by_row.gather(1, rows), -torch.inf)
    return VisionSelection(score, stays.gather(1, rows) & real, tuple(keep)), kwargs


def _with_merged(
    embeds: torch.Tensor, merged: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """A copy of ``embeds`` [B, Q, C] with ``merged`` tokens at their samples [G, 1] and rows [G, K]."""
    embeds = embeds.clone()
    for samples, rows, features in merged:
        embeds[samples.to(embeds.device), rows.to(embeds.device)] = features.to(embeds.device, embeds.dtype)
    return embeds


def _embeds_of(stage: Stage, kwargs: Kwargs) -> torch.Tensor:
    """The decoder's ``inputs_embeds``; ValueError if there are none, though ``stage`` needs them."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        raise ValueError(
            f"score={stage.score!r}, merge={stage.merge!r}: the decoder was given input_ids, which hold no image features; "
            "pass inputs_embeds"
        )
    return embeds


def _refuse_other_images(owner: PreTrainedModel, layout: Layout, tower: TowerOutput) -> None:
    """Raise ValueError if the images that were encoded are not those of the prompt."""
    if tower.tokens and not packs(owner):
        in_views = sum(len(view.rows) for view in layout.views)
        if in_views % tower.tokens:  # a multiple where generate() has repeated the prompt
            raise ValueError(
                f"the prompt has {in_views} visual tokens, and the vision encoder made {tower.tokens}: pass the images "
                "of the prompt only, and a visual_mask that names all of their tokens"
            )


def _layout(state: ForwardState, prompt: Prompt, stage: Stage) -> Layout:
    """Where the visual tokens stand; where nothing depends on that, all of a sample in one row, whatever the model."""
    if not needs_grid(stage):
        rows = [index[:count] for index, count in zip(prompt.visual_index, prompt.visual_counts, strict=True)]
        views = [View(b, b, row, (1, len(row)), row) for b, row in enumerate(rows) if len(row)]
        return Layout(tuple(views), torch.zeros_like(prompt.visual))
    return layout_of(
        state.attachment.owner, state.owner.kwargs, prompt.visual, prompt.visual_index, prompt.visual_counts
    )


def _scores(
    state: ForwardState,
    prompt: Prompt,
    stage: Stage,
    views: Sequence[View],
    tower: TowerOutput,
    kwargs: Kwargs,
) -> list[torch.Tensor]:
    """Score of each view's tokens, [N] float32."""
    device = prompt.visual.device
    if stage.score == "random":
        random_scores = draw(state.config.seed, 0, max(prompt.visual_counts)).to(device)
        number = prompt.visual.cumsum(dim=1) - 1  # of a row among the visual rows of its sample
        return [random_scores[number[view.sample, view.rows]] for view in views]
    if stage.score == "spatial":
        return [-spatial_order(view.grid).to(device).float() for view in views]
    if stage.score == "text_similarity":
        return _text_similarities(prompt, views, _embeds_of(stage, kwargs))
    by_feature: torch.Tensor = getattr(tower, stage.score)
    return [by_feature[view.features.to(by_feature.device)].to(device) for view in views]


def _text_similarities(prompt: Prompt, views: Sequence[View], embeds: torch.Tensor) -> list[torch.Tensor]:
    """Cosine to the mean embedding of the text after the image; where there is none, of all text."""
    all_text = [real - visual for real, visual in zip(prompt.real_counts, prompt.visual_counts, strict=True)]
    ends_in_image = torch.tensor([count == 0 for count in prompt.text_counts], device=prompt.visual.device)
    text = torch.where(ends_in_image[:, None], prompt.query_rows & ~prompt.visual, prompt.text_after)
    rows = positions_first(
        text, max(after or whole for after, whole in zip(prompt.text_counts, all_text, strict=True))
    )
    similarities = []
    for view in views:
        text_rows = rows[view.sample].to(embeds.device)
        visual = embeds[view.sample, view.rows.to(embeds.device)]
        words = embeds[view.sample, text_rows.clamp(min=0)]
        similarity = text_similarity(visual[None], words[None], (text_rows >= 0)[None])
        similarities.append(similarity[0].to(prompt.visual.device))
    return similarities


def _grouped(views: Sequence[View], scores: list[torch.Tensor], shares: Sequence[int]) -> list[Grids]:
    """Views of one size that keep equally many, together."""
    groups: dict[tuple[tuple[int, int], int], list[int]] = {}
    for number, keep in enumerate(shares):
        if keep:
            groups.setdefault((views[number].grid, keep), []).append(number)
    return [
        Grids(
            grid=grid,
            keep=keep,
            sample=tuple(views[i].sample for i in members),
            rows=torch.stack([views[i].rows for i in members]),
            features=torch.stack([views[i].features for i in members]),
            score=torch.stack([scores[i] for i in members]),
        )
        for (grid, keep), members in groups.items()
    ]


def _survivors_of(
    grids: Grids, stage: Stage, merging: Merging | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The survivors of each view, [G, K] ascending, and their embeddings [G, K, C] where others were merged into them."""

    def cover(keep: int) -> torch.Tensor:
        device, by = grids.score.device, stage.coverage
        neighbours = grid_neighbours(grids.grid, device=device)[None] if by == "region" else None
        order = spatial_order(grids.grid, device=device)[None] if by == "stride" else None
        return choose(grids.score, keep, by, neighbours=neighbours, order=order)

    if merging is None or grids.keep == grids.rows.shape[1]:
        return cover(grids.keep), None
    if not merging.before_projector:
        embeds = merging.embeds
        features = embeds[grids.samples_on(embeds.device), grids.rows.to(embeds.device)]
        return _merge(grids, merging, cover, features)
    features = _of_tower(merging.tower, "features", grids)
    merged = _merge(grids, merging, cover, features)
    return merged.index, merging.tower.project(merged.features.to(features.dtype))


def _of_tower(tower: TowerOutput, need: Need, grids: Grids) -> torch.Tensor:
    """[G, N, ...], what ``tower`` computed of each token."""
    rows = tower.rows[need]
    return rows[grids.features.to(rows.device)]


def _merge(
    grids: Grids, merging: Merging, cover: Callable[[int], torch.Tensor], features: torch.Tensor
) -> Merged:
    """Survivors of each view with their features, [G, K, C], of which ``features`` [G, N, C] are those of all tokens."""
    device, keep = features.device, grids.keep
    score = grids.score.to(device)

    def kept(count: int) -> torch.Tensor:
        return cover(count).to(device)

    if merging.merge == "average":
        return average(features, score, kept(keep - 1))
    if merging.merge == "aggregation":
        similarity = _of_tower(merging.tower, "similarity", grids).to(device)
        return aggregate(features, similarity, score, kept(keep), grids.grid, rule=merging.rule)
    keys = _of_tower(merging.tower, "keys", grids).to(device)
    if merging.merge == "contextual":
        count = int(contextual_count(keep))
        return contextual(features, keys, kept(keep - count), count)
    return nearest(features, keys, score, kept(keep - 1))


def _merging(
    attachment: Attachment, stage: Stage, layout: Layout, tower: TowerOutput, kwargs: Kwargs
) -> Merging:
    """How ``stage`` merges.

    Tokens merge before the projector if it maps features one by one and the decoder gets its output unchanged. That is a
    property of the model, found once per configuration, by the first prompt that shows it.
    """
    embeds, before_projector = _embeds_of(stage, kwargs), False
    if "features" in tower.rows:
        if attachment.projector_is_last is None:
            attachment.projector_is_last = _projector_is_last(layout, tower, embeds)
        before_projector = attachment.projector_is_last is not False
    return Merging(stage.merge, embeds, tower, before_projector, _rule_of(attachment.owner, before_projector))


def _projector_is_last(layout: Layout, tower: TowerOutput, embeds: torch.Tensor) -> bool | None:
    """Whether the decoder gets what the projector puts out, by a token of each image; None where none shows it. One read."""
    if not layout.views:
        return None
    sample = torch.tensor([view.sample for view in layout.views])
    rows, features = (
        torch.stack([getattr(view, name)[0] for view in layout.views]) for name in ("rows", "features")
    )
    entering = tower.rows["features"]
    mapped = tower.project(entering[features.to(entering.device)]).float()
    decoder_input = embeds[sample.to(embeds.device), rows.to(embeds.device)].float().to(mapped.device)
    size = decoder_input.abs().amax(dim=-1, keepdim=True)
    # An image of nothing but NaN, or of zeros, shows nothing.
    shows = (mapped.isfinite() & decoder_input.isfinite()).all(dim=-1) & (size[:, 0] > 0)
    close = ((mapped - decoder_input).abs() <= TOLERANCE * (size + decoder_input.abs())).all(dim=-1)
    any_shows, all_close = torch.stack([shows.any(), (close | ~shows).all()]).tolist()
    return all_close if any_shows else None


def _rule_of(owner: PreTrainedModel, before_projector: bool) -> AggregationRule:
    """Nüwa's constants for this kind of model: merged after the projector, images cut into tiles, or one grid for each."""
    if not before_projector:
        return QWEN
    return LLAVA_NEXT if packs(owner) else LLAVA
