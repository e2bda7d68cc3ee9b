"""Selecting visual tokens after the vision encoder, right before the decoder.

The prompt is complete here: the model has numbered, masked and embedded all of it. What is not selected is dropped before
the first decoder layer. So all other tokens keep the ids that they have without pruning, and no key of a dropped token is
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gap_kernels import collect_nearest, merge_nearest, scatter_rows, text_cosine, topk_indices
from torch import Tensor
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
    contextual_count,
    outlier_count,
    similarity_outlier_count,
    text_similarity,
)
from ..strategies.aggregation import aggregate_without_filler
from ..strategies.by_features import BY_FEATURES
from ..strategies.coverage import choose_on_grid, ranks_on_grid
from ..strategies.nearest import COLLECT_COUNT
from ..strategies.rows import best_last
from ..strategies.without_filler import (
    average_of_rest,
    best_first,
    best_of_rest,
    contextual_of_rest,
    rest_of,
)
from ..vision_tower import TowerOutput
from ..vision_tower.finding import packs
from .budget import ADDS_ONE, Budget, budget_of
from .layout import Layout, layout_of, layout_without_grid
from .needs import EARLIER_SCORES, MERGE_NEEDS, compares_entering
from .places import Group, Places, joined

Kwargs = dict[str, Any]


TOLERANCE = 1e-2  # relative; a model that changes the output of its projector changes it by more


@dataclass(frozen=True)
class Merging:
    """How tokens that are not chosen are merged into those that are.

    Attributes:
        merge: The method.
        embeds: [B * Q, C], what the decoder gets without it.
        rows: [B * V] int64, the row of each slot among these.
        tower: What the vision tower computed.
        before_projector: Tokens are merged as they enter the projector, which then maps what they make; else as the decoder
            gets them.
        rule: Constants of ``merge="aggregation"``.
    """

    merge: Merge
    embeds: Tensor
    rows: Tensor
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
    places = Places(_layout(state, prompt, stage), prompt.visual.device)
    layout = places.layout
    tower = TowerOutput() if state.recorder is None else state.recorder.output()
    merging = (
        None if stage.merge == "none" else _merging(state.attachment, stage, prompt, places, tower, kwargs)
    )
    _refuse_other_images(state.attachment.owner, layout, tower)
    scores = _scores(state, prompt, stage, places, tower, kwargs)  # [B, V]
    outliers = _outliers(places, scores, stage) if stage.keep == "outliers" else None
    budget = budget_of(layout, stage, outliers)
    keep = list(budget.newlines)
    for view, share in zip(layout.views, budget.views, strict=True):
        keep[view.sample] += share
    placed = places.is_placed()
    reported = scores if placed is None else torch.where(placed, scores, places.unplaced_scores(budget))
    beside = _beside(prompt, stage, places, tower, kwargs)
    ranks, merged = choose_and_merge(places, scores, budget, stage, merging, beside)
    if merging is not None and merged:
        kwargs = {**kwargs, "inputs_embeds": with_merged(merging, kwargs["inputs_embeds"], merged)}
    return VisionSelection(reported, ranks, tuple(keep)), kwargs


def choose_and_merge(
    places: Places,
    scores: Tensor,
    budget: Budget,
    stage: Stage,
    merging: Merging | None,
    beside: Tensor | None,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """Return what survives, and what changes of it.

    Args:
        places: Where the tokens stand.
        scores: [B, V] float32.
        budget: How many survive of each view.
        stage: How they are chosen.
        merging: How the others are merged into them; None = not at all.
        beside: [B * V, ...], what the coverage looks at beside scores; None = nothing.

    Returns:
        Ranks [B, V] float32 as in `VisionSelection`, None = ``scores``. And of the tokens that change, group by
        group, slots [G, K] and embeddings [G, K, C].
    """
    # The decoder's operator selects by itself where the best of a sample are what survives.
    are_best = stage.coverage == "topk" and stage.merge != "contextual" and places.one_view_each()
    if are_best and merging is None:
        return None, []
    groups = places.groups(budget.views)
    # And where it is told by what: every slot is of a view, and in its order.
    is_whole = places.one_view_each() and len(groups) == 1 and groups[0].are_all
    slots: list[Tensor] = []
    merged: list[tuple[Tensor, Tensor]] = []
    for group in groups:
        beside_score = None if beside is None else group.at_slots(beside).to(scores.device)
        score = group.at_slots(scores.flatten())
        chosen = _survivors_of(group, score, stage, merging, beside_score, is_whole)
        if chosen.changed is not None:
            merged.append((group.slots_at(chosen.changed.index), chosen.changed.features))
        if are_best:
            continue
        if is_whole and chosen.ranks is not None:
            return chosen.ranks.view(places.shape), merged
        slots += [group.slots_at(index).flatten() for index in chosen.index]
    return None if are_best else places.stay(budget, slots), merged


def with_merged(merging: Merging, embeds: Tensor, merged: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return a copy of ``embeds`` [B, Q, C] with ``merged`` tokens at their slots [G, K]."""
    slots = joined([slots.flatten() for slots, _ in merged])
    features = joined([features.flatten(0, 1) for _, features in merged])
    put = scatter_rows(
        features.to(embeds.device, embeds.dtype)[None],
        slots.to(embeds.device)[None],
        embeds.shape[0] * embeds.shape[1],
        among=merging.rows.to(embeds.device)[None],
        base=embeds.flatten(0, 1)[None],
    )
    return put.view_as(embeds)


def _embeds_of(stage: Stage, kwargs: Kwargs) -> Tensor:
    """The decoder's ``inputs_embeds``; ValueError if there are none, though ``stage`` needs them."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        raise ValueError(
            f"score={stage.score!r}, coverage={stage.coverage!r}, merge={stage.merge!r}: the decoder was given input_ids, "
            "which hold no image features; pass inputs_embeds"
        )
    return embeds


def _refuse_other_images(owner: PreTrainedModel, layout: Layout, tower: TowerOutput) -> None:
    """Raise ValueError if the images that were encoded are not those of the prompt."""
    if tower.tokens and not packs(owner):
        in_views = sum(view.size for view in layout.views)
        if in_views % tower.tokens:  # a multiple where generate() has repeated the prompt
            raise ValueError(
                f"the prompt has {in_views} visual tokens, and the vision encoder made {tower.tokens}: pass the images "
                "of the prompt only, and a visual_mask that names all of their tokens"
            )


def _layout(state: ForwardState, prompt: Prompt, stage: Stage) -> Layout:
    """Where the visual tokens stand; where nothing depends on that, all of a sample in one row, whatever the model."""
    layouts, counts = state.attachment.layouts, prompt.visual_counts
    if needs_grid(stage):
        return layout_of(
            state.attachment.owner,
            state.owner.kwargs,
            prompt.visual,
            prompt.visual_index,
            counts,
            recorded=None if state.recorder is None else state.recorder.encoded,
            layouts=layouts,
        )
    return layouts.get(("no grid", counts), None, lambda: layout_without_grid(counts))


def _scores(
    state: ForwardState,
    prompt: Prompt,
    stage: Stage,
    places: Places,
    tower: TowerOutput,
    kwargs: Kwargs,
) -> Tensor:
    """Score of each visual token, [B, V] float32; any at newlines and filler."""
    if stage.score == "random":
        return places.random(state.config.seed)
    if stage.score == "spatial":
        return places.spatial()
    if stage.score == "text_similarity":
        return _text_similarities(prompt, _embeds_of(stage, kwargs)).to(places.device)
    by_feature: Tensor = getattr(tower, stage.score)
    return places.at_features(by_feature).to(places.device)


def _beside(
    prompt: Prompt, stage: Stage, places: Places, tower: TowerOutput, kwargs: Kwargs
) -> Tensor | None:
    """What the coverage looks at beside scores: what tokens are compared by [B * V, C], or their score in an earlier layer
    [B * V]; any rows at filler, and at newlines where it comes from the vision encoder."""
    earlier = EARLIER_SCORES.get((stage.coverage, stage.score))
    if earlier is not None:
        return places.at_features(tower.rows[earlier]).flatten()
    if stage.coverage not in BY_FEATURES:
        return None
    entering = tower.features if compares_entering(stage) else None
    if entering is not None:
        return places.at_features(entering).flatten(0, 1)
    return _rows_of(_embeds_of(stage, kwargs), prompt.visual_index, prompt.visual_counts).flatten(0, 1)


def _text_similarities(prompt: Prompt, embeds: Tensor) -> Tensor:
    """Cosine to the mean embedding of the text after the image; where there is none, of all text. [B, V] float32."""
    device = embeds.device
    if all(prompt.text_counts):
        return text_cosine(embeds, prompt.visual_index.to(device), prompt.text_rows.to(device))
    text = prompt.text_after
    text = torch.where(text.any(dim=1, keepdim=True), text, prompt.query_rows & ~prompt.visual)
    visual = _rows_of(embeds, prompt.visual_index, prompt.visual_counts)
    return text_similarity(visual, embeds, text.to(device))


def _rows_of(embeds: Tensor, index: Tensor, counts: Sequence[int]) -> Tensor:
    """[B, N, C], the rows ``index`` [B, N] of ``embeds`` [B, Q, C]; row 0 in the place of -1, of which ``counts`` tells."""
    index = index.to(embeds.device)
    if min(counts) < index.shape[1]:
        index = index.clamp(min=0)
    return embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[2]))


def _outliers(places: Places, scores: Tensor, stage: Stage) -> list[int]:
    """How many tokens stand out in each view. One read for all."""
    views = places.layout.views
    if not views:
        return []
    groups = places.groups([1] * len(views))
    count = similarity_outlier_count if stage.score == "text_similarity" else outlier_count
    counts = torch.cat([count(group.at_slots(scores.flatten())) for group in groups]).tolist()
    by_view = dict(zip((number for group in groups for number in group.views), counts, strict=True))
    return [by_view[number] for number in range(len(views))]


class _Survivors(NamedTuple):
    """What survives of the views of a group.

    Attributes:
        ranks: [G, N] float32, of which the ``keep`` largest survive; None where that is not known.
        index: [G, K] int64, the survivors in one or several parts; none where ranks suffice.
        changed: Those that others were merged into, as embeddings; None where there are none.
    """

    ranks: Tensor | None
    index: list[Tensor]  # type: ignore[assignment]  # hides tuple.index, which is not needed here
    changed: Merged | None


def _survivors_of(
    group: Group,
    score: Tensor,
    stage: Stage,
    merging: Merging | None,
    beside: Tensor | None,
    is_whole: bool,
) -> _Survivors:
    """Choose from the views of a group, and merge.

    ``score`` is [G, N], and ``beside`` [G, N, ...] what the coverage looks at beside it. With ``is_whole`` ranks suffice.
    """
    keep = group.keep

    def ranks_of(count: int) -> Tensor | None:
        return ranks_on_grid(score, count, stage.coverage, group.grid, beside, spread=stage.spread)

    def chosen(count: int) -> Tensor:
        return choose_on_grid(
            score,
            count,
            stage.coverage,
            group.grid,
            beside,
            exponent=stage.exponent,
            per_region=stage.per_region,
            spread=stage.spread,
        )

    if merging is None or keep == group.size[1]:
        ranks = ranks_of(keep)
        if ranks is None:
            return _Survivors(None, [chosen(keep)], None)
        return _Survivors(ranks, [] if is_whole else [topk_indices(ranks, keep)], None)
    if merging.merge == "contextual":
        found = _with_contextual(group, merging, score, chosen, stage.coverage)
    elif merging.merge in ADDS_ONE:
        ranks = ranks_of(keep - 1)
        if ranks is None:
            kept = chosen(keep - 1)
            index = torch.cat([kept, best_of_rest(score, kept)], dim=1)
        else:
            index = best_first(ranks, keep)
        found = _Survivors(ranks, [index], _merge(group, merging, score, index))
    else:
        ranks = ranks_of(keep)
        index = chosen(keep) if ranks is None else topk_indices(ranks, keep)
        found = _Survivors(ranks, [index], _merge(group, merging, score, index))
    if merging.before_projector and found.changed is not None:
        features = merging.tower.project(found.changed.features)
        found = found._replace(changed=found.changed._replace(features=features))
    return found


def _with_contextual(
    group: Group,
    merging: Merging,
    score: Tensor,
    chosen: Callable[[int], Tensor],
    coverage: str,
) -> _Survivors:
    """The dominant tokens of each view, and the contextual ones with their features."""
    num_rows, ranks = group.size[1], None  # type: tuple[int, Tensor | None]
    count = int(contextual_count(group.keep))
    dominant = group.keep - count
    if coverage == "topk":
        ranks = best_last(score)
        order = best_first(ranks, num_rows)
        kept, rest = order[:, :dominant], order[:, dominant:].sort(dim=1).values
    else:
        kept = chosen(dominant)
        rest = rest_of(kept, num_rows)
    features = _features_of(group, merging)
    keys = group.at_features(merging.tower.rows["keys"]).to(features.device)
    merged = contextual_of_rest(features, keys, kept.to(features.device), rest.to(features.device), count)
    merged = merged._replace(index=merged.index.to(score.device))
    if ranks is not None:  # behind the contextual ones, the dominant ones are the best
        ranks.scatter_(1, merged.index, torch.inf)
    return _Survivors(ranks, [kept, merged.index], merged)


def _features_of(group: Group, merging: Merging) -> Tensor:
    """What is merged, [G, N, C]: tokens as they enter the projector, or as the decoder gets them."""
    if merging.before_projector:
        return group.at_features(merging.tower.rows["features"])
    return merging.embeds[group.at_slots(merging.rows).to(merging.embeds.device)]


def _merge(group: Group, merging: Merging, score: Tensor, survivors: Tensor) -> Merged:
    """The tokens of each view that change, with their features; but by ``"contextual"``.

    Args:
        group: The views.
        merging: How.
        score: [G, N] float32.
        survivors: [G, K] int64; if one token more is made of what is dropped, that comes last.
    """
    recorded: Mapping[Any, Tensor] = merging.tower.rows
    features = _features_of(group, merging)
    device = features.device
    score, index = score.to(device), survivors.to(device)
    if merging.merge == "average":
        return Merged(survivors[:, -1:], average_of_rest(features, index[:, :-1]))
    if merging.merge == "cluster":
        return Merged(survivors, merge_nearest(features, features, index, average=True))
    if merging.merge == "aggregation":
        similarity = group.at_features(recorded["similarity"]).to(device)
        merged = aggregate_without_filler(features, similarity, score, index, group.grid, rule=merging.rule)
        return merged._replace(index=survivors)
    keys = group.at_features(recorded["keys"]).to(device)
    return Merged(survivors, collect_nearest(features, keys, score, index[:, :-1], COLLECT_COUNT))


def _merging(
    attachment: Attachment, stage: Stage, prompt: Prompt, places: Places, tower: TowerOutput, kwargs: Kwargs
) -> Merging:
    """How ``stage`` merges.

    Tokens merge before the projector if it maps features one by one and the decoder gets its output unchanged. That is a
    property of the model, found once per configuration, by the first prompt that shows it.
    """
    embeds, before_projector = _embeds_of(stage, kwargs), False
    rows = prompt.visual_index
    if len(rows) > 1:
        rows = rows + places.sample_starts(embeds.shape[1])
    rows = rows.flatten()
    if "features" in tower.rows and "features" in MERGE_NEEDS[stage.merge]:
        if attachment.projector_is_last is None:
            attachment.projector_is_last = _projector_is_last(places, rows, tower, embeds)
        before_projector = attachment.projector_is_last is not False
    rule = _rule_of(attachment.owner, before_projector)
    return Merging(stage.merge, embeds.flatten(0, 1), rows, tower, before_projector, rule)


def _projector_is_last(places: Places, rows: Tensor, tower: TowerOutput, embeds: Tensor) -> bool | None:
    """Whether the decoder gets what the projector puts out, by a token of each image; None where none shows it. One read."""
    views = places.layout.views
    if not views:
        return None
    slots = torch.tensor([view.sample * places.shape[1] + int(view.numbers[0]) for view in views])
    features = torch.tensor([int(view.features[0]) for view in views])
    entering = tower.rows["features"]
    mapped = tower.project(entering[features.to(entering.device)]).float()
    first = rows[slots.to(rows.device)].to(embeds.device)
    decoder_input = embeds.flatten(0, 1)[first].float().to(mapped.device)
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
