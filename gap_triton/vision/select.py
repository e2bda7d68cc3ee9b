"""Choosing visual tokens after the vision encoder, at the decoder's door.

The prompt is whole here: the model has numbered, masked and embedded it as if nothing were ever dropped. What is chosen now
is dropped before the first decoder layer, so the ids of all that follows are those without pruning, and no key of a dropped
token is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gap_kernels import grid_neighbours
from transformers import PreTrainedModel

from ..attachment import Attachment
from ..config import Stage, asks_for_places
from ..state import Chosen, ForwardState, Prompt
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
from ..vision_tower import TowerOutput
from ..vision_tower.finding import packs
from .budget import budget_of, newlines_that_stay
from .layout import Layout, View, layout_of

Kwargs = dict[str, Any]


CLOSE = 1e-2  # relative; a model that does something behind its projector does more than that


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


def choose_before_the_decoder(
    state: ForwardState, prompt: Prompt, stage: Stage, kwargs: Kwargs
) -> tuple[Chosen, Kwargs]:
    """Choose, and merge what is not chosen.

    Args:
        state: The running forward.
        prompt: The prompt.
        stage: How.
        kwargs: Keyword arguments of the decoder, with ``inputs_embeds`` [B, Q, C].

    Returns:
        What survives; and the keyword arguments, with merged tokens in the place of the survivors that took them in.

    Raises:
        ValueError: The score or the merge asks for something that this prompt or this model does not have.
    """
    layout = _layout(state, prompt, stage)
    told = None if state.watch is None else state.watch.output()
    embeds = kwargs.get("inputs_embeds")
    _refuse_what_does_not_fit(state.attachment.owner, stage, layout, told, embeds)
    scores = _scores(state, prompt, stage, layout.views, told, embeds)
    device = prompt.visual.device
    budget = budget_of(layout.views, scores, stage, prompt.visual_counts)
    keep = list(budget.newlines)
    for view, kept in zip(layout.views, budget.views, strict=True):
        keep[view.sample] += kept
    stays = newlines_that_stay(layout.unplaced, budget)
    by_row = torch.where(stays, torch.inf, -torch.inf).to(torch.float32)
    for view, score in zip(layout.views, scores, strict=True):
        by_row[view.sample, view.rows] = score
    before = stage.merge != "none" and _merges_before_projector(state.attachment, layout, told, embeds)
    rule = _rule_of(state.attachment.owner, before)
    for grids in _grouped(layout.views, scores, budget.views):
        sample = torch.tensor(grids.sample, device=device)[:, None]
        index, merged = _choose(grids, stage, told, embeds, before, rule)
        chosen = grids.rows.gather(1, index)
        stays[sample, chosen] = True
        if merged is not None:
            assert embeds is not None
            if embeds is kwargs["inputs_embeds"]:
                embeds = embeds.clone()
            embeds[sample.to(embeds.device), chosen.to(embeds.device)] = merged.to(
                embeds.device, embeds.dtype
            )
    if embeds is not None:
        kwargs = {**kwargs, "inputs_embeds": embeds}
    rows = prompt.visual_index.clamp(min=0)
    real = prompt.visual_index >= 0
    score = torch.where(real, by_row.gather(1, rows), -torch.inf)
    return Chosen(score, stays.gather(1, rows) & real, tuple(keep)), kwargs


def _refuse_what_does_not_fit(
    owner: PreTrainedModel,
    stage: Stage,
    layout: Layout,
    told: TowerOutput | None,
    embeds: torch.Tensor | None,
) -> None:
    """Raise ValueError if ``stage`` needs embeddings that there are not, or the images are not those of the prompt."""
    if embeds is None and (stage.score == "text_similarity" or stage.merge != "none"):
        raise ValueError(
            f"score={stage.score!r}, merge={stage.merge!r}: the decoder was given input_ids, which hold no image features; "
            "pass inputs_embeds"
        )
    if told is not None and told.tokens and not packs(owner):
        placed = sum(len(view.rows) for view in layout.views)
        if placed % told.tokens:  # a multiple where generate() has repeated the prompt
            raise ValueError(
                f"the prompt has {placed} visual tokens, and the vision encoder made {told.tokens}: pass the images of the "
                "prompt only, and a visual_mask that names all of their tokens"
            )


def _layout(state: ForwardState, prompt: Prompt, stage: Stage) -> Layout:
    """Where the visual tokens stand; where nothing depends on that, all of a sample in one row, whatever the model."""
    if not asks_for_places(stage):
        rows = [index[:count] for index, count in zip(prompt.visual_index, prompt.visual_counts, strict=True)]
        views = [View(b, b, row, (1, len(row)), row) for b, row in enumerate(rows) if len(row)]
        return Layout(tuple(views), torch.zeros_like(prompt.visual))
    return layout_of(
        state.attachment.owner, state.owner_kwargs, prompt.visual, prompt.visual_index, prompt.visual_counts
    )


def _scores(
    state: ForwardState,
    prompt: Prompt,
    stage: Stage,
    views: Iterable[View],
    told: TowerOutput | None,
    embeds: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Score of each view's tokens, [N] float32."""
    device = prompt.visual.device
    views = tuple(views)
    if stage.score == "random":
        drawn = draw(state.config.seed, 0, max(prompt.visual_counts)).to(device)
        place = prompt.visual.cumsum(dim=1) - 1  # of a row among the visual rows of its sample
        return [drawn[place[view.sample, view.rows]] for view in views]
    if stage.score == "spatial":
        return [-spatial_order(view.grid).to(device).float() for view in views]
    if stage.score == "text_similarity":
        assert embeds is not None
        return _text_similarities(prompt, views, embeds)
    assert told is not None
    by_feature = getattr(told, stage.score)
    return [by_feature[view.features.to(by_feature.device)].to(device) for view in views]


def _text_similarities(prompt: Prompt, views: tuple[View, ...], embeds: torch.Tensor) -> list[torch.Tensor]:
    """Cosine to the mean embedding of the text after the image; where there is none, of all text."""
    all_text = [real - visual for real, visual in zip(prompt.real_counts, prompt.visual_counts, strict=True)]
    ends_in_image = torch.tensor([count == 0 for count in prompt.text_counts], device=prompt.visual.device)
    text = torch.where(ends_in_image[:, None], prompt.asking & ~prompt.visual, prompt.text_after)
    rows = positions_first(
        text, max(after or whole for after, whole in zip(prompt.text_counts, all_text, strict=True))
    )
    found = []
    for view in views:
        own = rows[view.sample].to(embeds.device)
        visual = embeds[view.sample, view.rows.to(embeds.device)]
        words = embeds[view.sample, own.clamp(min=0)]
        similarity = text_similarity(visual[None], words[None], (own >= 0)[None])
        found.append(similarity[0].to(prompt.visual.device))
    return found


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


def _choose(
    grids: Grids,
    stage: Stage,
    told: TowerOutput | None,
    embeds: torch.Tensor | None,
    before: bool,
    rule: AggregationRule,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What survives of each view, [G, K] ascending, and its embeddings [G, K, C] where some survivors took others in.

    Tokens merge before the projector if ``before`` says so, else as the decoder gets them.
    """

    def covering(keep: int) -> torch.Tensor:
        device = grids.score.device
        return choose(
            grids.score,
            keep,
            stage.coverage,
            neighbours=grid_neighbours(grids.grid, device=device)[None]
            if stage.coverage == "region"
            else None,
            order=spatial_order(grids.grid, device=device)[None] if stage.coverage == "stride" else None,
        )

    if stage.merge == "none" or grids.keep == grids.rows.shape[1]:
        return covering(grids.keep), None
    assert embeds is not None
    if before:
        features = told.features[grids.features.to(told.features.device)]  # type: ignore[union-attr,index]
    else:
        sample = torch.tensor(grids.sample, device=embeds.device)[:, None]
        features = embeds[sample, grids.rows.to(embeds.device)]
    merged = _merge(grids, stage, covering, told, features, rule)
    if not before:
        return merged.index, merged.features
    return merged.index, told.project(merged.features.to(features.dtype))  # type: ignore[union-attr]


def _merge(
    grids: Grids,
    stage: Stage,
    covering: Callable[[int], torch.Tensor],
    told: TowerOutput | None,
    features: torch.Tensor,
    rule: AggregationRule,
) -> Merged:
    """Survivors of each view with their features, [G, K, C], of which ``features`` [G, N, C] are those of all tokens."""
    device = features.device
    score = grids.score.to(device)

    def kept(keep: int) -> torch.Tensor:
        return covering(keep).to(device)

    def of_tower(rows: torch.Tensor) -> torch.Tensor:
        return rows[grids.features.to(rows.device)].to(device)

    if stage.merge == "average":
        return average(features, score, kept(grids.keep - 1))
    assert told is not None
    if stage.merge == "aggregation":
        assert told.similarity is not None
        return aggregate(features, of_tower(told.similarity), score, kept(grids.keep), grids.grid, rule=rule)
    assert told.keys is not None
    if stage.merge == "contextual":
        count = int(contextual_count(grids.keep))
        return contextual(features, of_tower(told.keys), kept(grids.keep - count), count)
    return nearest(features, of_tower(told.keys), score, kept(grids.keep - 1))


def _merges_before_projector(
    attachment: Attachment, layout: Layout, told: TowerOutput | None, embeds: torch.Tensor | None
) -> bool:
    """Whether there is a projector that maps features one by one to what the decoder gets, and nothing is done behind it.

    That is a property of the model, found once per configuration, by the first prompt that shows it.
    """
    if told is None or told.features is None or embeds is None:
        return False
    if attachment.projector_is_last is None:
        attachment.projector_is_last = _projector_is_last(layout, told, embeds)
    return attachment.projector_is_last is not False


def _projector_is_last(layout: Layout, told: TowerOutput, embeds: torch.Tensor) -> bool | None:
    """Whether the decoder gets what the projector puts out, by a token of each image; None where none tells. One read."""
    assert told.features is not None
    if not layout.views:
        return None
    sample = torch.tensor([view.sample for view in layout.views])
    rows, features = (
        torch.stack([getattr(view, name)[0] for view in layout.views]) for name in ("rows", "features")
    )
    mapped = told.project(told.features[features.to(told.features.device)]).float()
    given = embeds[sample.to(embeds.device), rows.to(embeds.device)].float().to(mapped.device)
    size = given.abs().amax(dim=-1, keepdim=True)
    # An image of nothing but NaN, or of zeros, shows nothing.
    shows = (mapped.isfinite() & given.isfinite()).all(dim=-1) & (size[:, 0] > 0)
    close = ((mapped - given).abs() <= CLOSE * (size + given.abs())).all(dim=-1)
    any_shows, all_close = torch.stack([shows.any(), (close | ~shows).all()]).tolist()
    return all_close if any_shows else None


def _rule_of(owner: PreTrainedModel, before_projector: bool) -> AggregationRule:
    """Nüwa's constants for this kind of model: merged behind a projector, images cut into tiles, or one grid for each."""
    if not before_projector:
        return QWEN
    return LLAVA_NEXT if packs(owner) else LLAVA
