"""Dropping: rank the visual tokens, keep the best in order, and note what was kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from gap_kernels import PrunedTokens, prune_by_score, prune_tokens, topk_indices

from ..arguments import cache_of
from ..config import ATTENTION_SCORES, BEFORE_THE_DECODER, asks_for_text
from ..kv_cache.kept_tokens import KeptTokens, extend, store
from ..kv_cache.static_cache import fit
from ..later_layers.inputs import lowered, survivors_of
from ..selection import Selection
from ..state import Drop, ForwardState, Plan
from .position_ids import compact, score_order
from .prompt import plan_of
from .scores import attention_of, scores_of

FiveTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def drop(state: ForwardState, now: Drop, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Drop what ``now`` says, between the pruning layer and the next.

    Args:
        state: The running forward; takes note of survivors, ids and rotary embeddings for the later layers.
        now: The stage.
        hidden_states: [B, S, C], output of the pruning layer.
        kwargs: Keyword arguments of the first later layer.

    Returns:
        The surviving rows, [B, L, C], filler on the left.
    """
    assert state.prompt is not None
    batch, queries = state.batch, state.queries
    device = hidden_states.device
    index = state.slots
    plan = plan_of(state.prompt, now, state.raters, index).to(device)
    index = None if index is None else index.to(device)
    rows = plan.visual.shape[1]

    rotary = kwargs.get("position_embeddings")
    # The operator gathers one cos and sin of three dimensions. Others are gathered by `later.shorten`, as the layers
    # bring them; here an empty pair stands in.
    cos = sin = hidden_states.new_empty(1, rows, 1)
    one_pair = isinstance(rotary, tuple) and len(rotary) == 2 and all(x.dim() == 3 for x in rotary)
    state.rotary = rotary if index is None else survivors_of(state, "position_embeddings", rotary)
    if one_pair:
        cos, sin = state.rotary
    cos, sin = (x.to(device).expand(batch, -1, -1) for x in (cos, sin))
    assert state.position_ids is not None
    position_ids = state.position_ids.to(device)
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch, queries).contiguous()
    # Some M-RoPE models count in floats. The ids in the state stay what they are; the operator gathers integers.
    whole_ids = position_ids.long()
    pruned = _score_and_prune(
        state,
        now,
        plan,
        index,
        (
            hidden_states,
            cos,
            sin,
            whole_ids if index is None else _take(whole_ids, index),
            plan.visual_index,
        ),
    )
    state.scorer = state.query = state.key = state.mask = state.rotary = None
    surviving = pruned.index if index is None else _rows_of(index, pruned.index)

    real = state.prompt.real.to(device)
    # A last row that is padding stays for its logits, but nobody may attend to it.
    alive = (surviving >= 0) & real.gather(1, surviving.clamp(min=0))
    of_prompt = surviving.shape[1] - state.drafts
    assert isinstance(state.past, int)
    record = extend(
        None if state.before is None else state.before.stages[state.done],
        now.stage.layer,
        torch.where(alive, surviving + state.past, -1)[:, :of_prompt],
        past=state.past,
        queries=queries - state.drafts,
        real=state.real,
        dense=now.dense,
    )

    state.slots = state.survivors = surviving
    state.taken = []
    survivors, new_ids = pruned.hidden_states, pruned.position_ids
    if state.config.ids == "permuted":
        state.survivors = score_order(surviving, plan.visual, plan.visual_index, pruned.scores)
        source = state.survivors.clamp(min=0)
        survivors = hidden_states.gather(1, source[..., None].expand_as(survivors))
    if state.config.ids != "kept":
        asking = state.prompt.asking.to(device)
        new_ids, shift = compact(position_ids, surviving, asking, record.id_shift)
        record = replace(record, id_shift=shift)
        if state.prompt.asking is not state.prompt.real:  # an answer is numbered as tokens of later steps are
            following = _take(lowered(position_ids, shift), surviving)
            is_answer = (real & ~asking).gather(1, surviving.clamp(min=0))
            new_ids = torch.where(is_answer, following, new_ids)
        state.new_ids = new_ids
    elif one_pair:
        state.taken.append((rotary, (pruned.cos, pruned.sin)))

    state.left.append(state.survivors)
    if now.stage.layer == BEFORE_THE_DECODER:
        state.embeds = hidden_states

    before = state.before.stages if state.before is not None else ()
    already = () if state.kept is None or not state.done else state.kept.stages[: state.done]
    whole = not any(asks_for_text(each.stage) for each in state.drops) and not any(state.prompt.ends_in_image)
    state.kept = KeptTokens((*already, record, *before[state.done + 1 :]), state.config.ids, whole)
    cache = cache_of(kwargs)
    store(cache, state.kept)
    if state.past == 0 and not state.done:
        fit(cache, {each.first_later: queries - each.length for each in state.drops})
    state.done += 1
    scores, candidates = pruned.scores, plan.visual_index
    if index is not None:
        candidates = _rows_of(index, candidates)
    state.selection = Selection(
        surviving[:, :of_prompt],
        new_ids[..., :of_prompt],
        candidates,
        scores,
        state.prompt.visual[:, : queries - state.drafts],
        before=state.selection,
    )
    return survivors


def _rows_of(index: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows of the prompt, [B, N], from ``places`` [B, N] among the rows ``index`` [B, S]; -1 stays -1."""
    return torch.where(places < 0, -1, index.gather(1, places.clamp(min=0)))


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``values`` [..., B, Q] at the rows ``index`` [B, S], filler taken from row 0."""
    return values.gather(-1, index.clamp(min=0).expand(*values.shape[:-1], -1))


def _score_and_prune(
    state: ForwardState, now: Drop, plan: Plan, index: torch.Tensor | None, tokens: FiveTensors
) -> PrunedTokens:
    """``tokens``: hidden states, cos, sin, position ids, visual index."""
    real = plan.real if plan.padded else None
    stage, device = now.stage, tokens[0].device

    def prune(scores: torch.Tensor, keep: torch.Tensor = plan.keep) -> PrunedTokens:
        return prune_by_score(scores, *tokens, keep, attention_mask=real, length=now.length)

    if stage.layer == BEFORE_THE_DECODER:
        assert state.chosen is not None
        scores, chosen = state.chosen.score.to(device), state.chosen.stays.to(device)
    else:
        asked = attention_of(state, stage, plan) if stage.score in ATTENTION_SCORES else None
        by_rank = stage.coverage == "topk"
        if asked is not None and asked.plain and by_rank and plan.stays is None:
            return prune_tokens(
                asked.query,
                asked.key,
                *tokens,
                plan.keep,
                rows=plan.rows,
                attention_mask=asked.columns,
                scale=asked.scale,
                length=now.length,
            )
        where = plan.visual_index if index is None else _rows_of(index, plan.visual_index)
        scores = scores_of(state, stage, plan, where, asked)
        if by_rank and plan.stays is None:
            return prune(scores)
        if by_rank:
            chosen = _best(scores, plan, max(now.keep))
        else:
            assert state.places is not None
            chosen = (
                state.places.choose(
                    scores, plan.visual_index, where, plan.keep, stage.coverage, max(now.keep)
                )
                > 0
            )
    keep = plan.keep
    if plan.stays is not None:
        chosen = chosen | plan.stays
        keep = chosen.sum(dim=1)
    return prune(chosen.float(), keep)._replace(scores=scores)


def _best(scores: torch.Tensor, plan: Plan, most: int) -> torch.Tensor:
    """[B, V] bool, the ``plan.keep`` best of each sample, by the operator's own rule."""
    scores = torch.where(plan.visual_index < 0, torch.nan, scores)  # filler comes last of all
    index = topk_indices(scores, plan.keep, length=most)
    chosen = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    return chosen.scatter(1, torch.where(index < 0, scores.shape[1], index), True)[:, :-1]
