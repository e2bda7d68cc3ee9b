"""Dropping: rank the visual tokens, keep the best in order, and note what was kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from gap_kernels import PrunedTokens, prune_by_score, prune_tokens, topk_indices

from ..config import ATTENTION_SCORES, BEFORE_THE_DECODER, asks_for_text
from ..kv_cache.kept_tokens import KeptRows, KeptTokens, extend
from ..later_layers.inputs import survivors_of
from ..selection import Selection
from ..state import Drop, ForwardState, Plan, Prefill, Survivors
from ..strategies.rows import take_values
from .plan import plan_of
from .position_ids import ID_RULES
from .scores import attention_of, scores_of

FiveTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Dropped(NamedTuple):
    """What one stage leaves.

    Attributes:
        hidden_states: [B, L, C], the surviving rows, filler on the left.
        kept: What all layers hold after this forward.
        selection: The same for users to look at.
    """

    hidden_states: torch.Tensor
    kept: KeptTokens
    selection: Selection


@dataclass(frozen=True)
class Rows:
    """The rows that a stage finds: S of them, all Q of the forward in the first stage.

    Attributes:
        plan: What is to be dropped from them.
        index: [B, S] int64, their rows in the prompt, -1 = filler; None where they are all of it.
        tokens: Their hidden states [B, S, C], cos and sin [B, S, D], position ids [B, S] or [A, B, S], and visual rows.
        rotary: Their rotary embeddings, as the layer brings them.
        one_pair: ``cos`` and ``sin`` are the layer's own, and no empty stand-ins.
    """

    plan: Plan
    index: torch.Tensor | None
    tokens: FiveTensors
    rotary: Any
    one_pair: bool

    def in_prompt(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the prompt, [B, N], from ``rows`` [B, N] among these; -1 stays -1."""
        if self.index is None:
            return rows
        return torch.where(rows < 0, -1, self.index.gather(1, rows.clamp(min=0)))


def drop(
    state: ForwardState, prefill: Prefill, step: Drop, hidden_states: torch.Tensor, kwargs: dict[str, Any]
) -> Dropped:
    """Drop tokens between the pruning layer and the next.

    Args:
        state: The running forward.
        prefill: Its prompt; takes note of survivors, ids and rotary embeddings for the later layers.
        step: What it drops.
        hidden_states: [B, S, C], output of the pruning layer.
        kwargs: Keyword arguments of the first later layer.
    """
    rotary = kwargs.get("position_embeddings")
    position_ids = _unpruned_ids(state, prefill, hidden_states.device)
    found = _rows_found(state, prefill, step, hidden_states, position_ids, rotary)
    pruned = _score_and_prune(state, prefill, step, found)
    prefill.scoring = None
    surviving = found.in_prompt(pruned.index)
    record = _record_of(state, prefill, step, surviving)
    rule = ID_RULES[state.config.ids]
    survivors, order = pruned.hidden_states, rule.order(surviving, found.plan, pruned.scores)
    if order is not surviving:
        survivors = hidden_states.gather(1, order.clamp(min=0)[..., None].expand_as(survivors))
    ids, new_ids = pruned.position_ids, None
    renumbered = rule.number(position_ids, surviving, prefill.prompt, record.id_shift)
    if renumbered is not None:
        ids, shift = renumbered
        new_ids, record = ids, replace(record, id_shift=shift)

    kept = _kept_with(state, prefill, record)
    left = Survivors(surviving, order, new_ids)
    if found.one_pair and new_ids is None:
        left.taken.append((rotary, (pruned.cos, pruned.sin)))
    prefill.left.append(left)
    if step.stage.layer == BEFORE_THE_DECODER:
        prefill.embeds = hidden_states
    candidates = found.in_prompt(found.plan.visual_index)
    return Dropped(survivors, kept, _selection_of(prefill, surviving, ids, candidates, pruned.scores))


def _unpruned_ids(state: ForwardState, prefill: Prefill, device: torch.device) -> torch.Tensor:
    """[B, Q] or [A, B, Q], the ids of all rows of the forward."""
    ids = prefill.position_ids.to(device)
    return ids.expand(*ids.shape[:-2], state.batch, state.queries).contiguous()


def _rows_found(
    state: ForwardState,
    prefill: Prefill,
    step: Drop,
    hidden_states: torch.Tensor,
    position_ids: torch.Tensor,
    rotary: Any,
) -> Rows:
    """The rows that ``step`` finds, as the operator takes them."""
    device, earlier = hidden_states.device, state.survivors
    index = None if earlier is None else earlier.rows
    plan = plan_of(prefill.prompt, step, prefill.raters, index).to(device)
    index = None if index is None else index.to(device)
    # The operator gathers one cos and sin of three dimensions. Others are gathered by `later_layers.inputs.shorten`, as the
    # layers bring them; here an empty pair stands in.
    cos = sin = hidden_states.new_empty(1, plan.visual.shape[1], 1)
    one_pair = isinstance(rotary, tuple) and len(rotary) == 2 and all(x.dim() == 3 for x in rotary)
    if earlier is not None:
        rotary = survivors_of(state, earlier, "position_embeddings", rotary)
    if one_pair:
        cos, sin = rotary
    cos, sin = (x.to(device).expand(state.batch, -1, -1) for x in (cos, sin))
    # Some M-RoPE models count in floats. The ids in the state stay what they are; the operator gathers integers.
    ids = position_ids.long()
    ids = ids if index is None else take_values(ids, index)
    return Rows(plan, index, (hidden_states, cos, sin, ids, plan.visual_index), rotary, one_pair)


def _record_of(state: ForwardState, prefill: Prefill, step: Drop, surviving: torch.Tensor) -> KeptRows:
    """What the layers after ``step`` hold, with the rows ``surviving`` [B, L] of the prompt."""
    # A last row that is padding stays for its logits, but nobody may attend to it.
    real = prefill.prompt.real.to(surviving.device)
    alive = (surviving >= 0) & real.gather(1, surviving.clamp(min=0))
    positions = torch.where(alive, surviving + prefill.past, -1)
    return extend(
        None if state.before is None else state.before.stages[prefill.done],
        step.stage.layer,
        positions[:, : positions.shape[1] - prefill.drafts],
        past=prefill.past,
        queries=state.queries - prefill.drafts,
        real=state.real,
        dense=step.dense,
    )


def _kept_with(state: ForwardState, prefill: Prefill, record: KeptRows) -> KeptTokens:
    """What all layers hold, once those after this stage hold what ``record`` says."""
    before = state.before.stages if state.before is not None else ()
    already = () if state.kept is None or not prefill.done else state.kept.stages[: prefill.done]
    whole = not any(asks_for_text(each.stage) for each in prefill.drops) and not any(
        prefill.prompt.ends_in_image
    )
    return KeptTokens((*already, record, *before[prefill.done + 1 :]), state.config.ids, whole)


def _selection_of(
    prefill: Prefill,
    surviving: torch.Tensor,
    ids: torch.Tensor,
    candidates: torch.Tensor,
    scores: torch.Tensor,
) -> Selection:
    of_prompt = surviving.shape[1] - prefill.drafts
    return Selection(
        surviving[:, :of_prompt],
        ids[..., :of_prompt],
        candidates,
        scores,
        prefill.prompt.visual[:, : prefill.prompt.visual.shape[1] - prefill.drafts],
        before=prefill.selection,
    )


def _score_and_prune(state: ForwardState, prefill: Prefill, step: Drop, found: Rows) -> PrunedTokens:
    plan, tokens = found.plan, found.tokens
    real = plan.real if plan.padded else None
    stage, device = step.stage, tokens[0].device

    def prune(scores: torch.Tensor, keep: torch.Tensor = plan.keep) -> PrunedTokens:
        return prune_by_score(scores, *tokens, keep, attention_mask=real, length=step.length)

    if stage.layer == BEFORE_THE_DECODER:
        assert prefill.chosen is not None
        scores, chosen = prefill.chosen.score.to(device), prefill.chosen.stays.to(device)
    else:
        attention = (
            attention_of(state, prefill, stage, plan, found.rotary)
            if stage.score in ATTENTION_SCORES
            else None
        )
        by_rank = stage.coverage == "topk"
        if attention is not None and attention.plain and by_rank and plan.stays is None:
            return prune_tokens(
                attention.query,
                attention.key,
                *tokens,
                plan.keep,
                rows=plan.rows,
                attention_mask=attention.columns,
                scale=attention.scale,
                length=step.length,
            )
        prompt_rows = found.in_prompt(plan.visual_index)
        scores = scores_of(state, prefill, stage, plan, prompt_rows, attention)
        if by_rank and plan.stays is None:
            return prune(scores)
        if by_rank:
            chosen = _best(scores, plan, max(step.keep))
        else:
            assert prefill.places is not None
            chosen = (
                prefill.places.choose(
                    scores, plan.visual_index, prompt_rows, plan.keep, stage.coverage, max(step.keep)
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
