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
from ..state import DecoderRun, Drop, Plan, Prefill, Survivors
from ..strategies.rows import take_values
from .plan import plan_of
from .position_ids import ID_RULES
from .scores import Attention, attention_of, scores_by_attention, scores_without_attention

FiveTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Dropped(NamedTuple):
    """What one stage leaves.

    Attributes:
        hidden_states: [B, L, C], the surviving rows, filler on the left.
        rows: What the layers up to the next stage hold after this forward.
        kept: What all layers hold after it.
        selection: The same for users to look at.
    """

    hidden_states: torch.Tensor
    rows: KeptRows
    kept: KeptTokens
    selection: Selection


@dataclass(frozen=True)
class RowsFound:
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
    run: DecoderRun, prefill: Prefill, step: Drop, hidden_states: torch.Tensor, kwargs: dict[str, Any]
) -> Dropped:
    """Drop tokens between the pruning layer and the next.

    Args:
        run: The run of the decoder.
        prefill: Its prompt; takes note of survivors, ids and rotary embeddings for the later layers.
        step: What it drops.
        hidden_states: [B, S, C], output of the pruning layer.
        kwargs: Keyword arguments of the first later layer.
    """
    rotary = kwargs.get("position_embeddings")
    position_ids = _unpruned_ids(run, prefill, hidden_states.device)
    found = _rows_found(run, prefill, step, hidden_states, position_ids, rotary)
    pruned = _score_and_prune(run, prefill, step, found)
    prefill.scoring = None
    surviving = found.in_prompt(pruned.index)
    record = _record_of(run, prefill, step, surviving)
    rule = ID_RULES[run.config.ids]
    survivors, order = pruned.hidden_states, rule.order(surviving, found.plan, pruned.scores)
    if order is not surviving:
        survivors = hidden_states.gather(1, order.clamp(min=0)[..., None].expand_as(survivors))
    ids, new_ids = pruned.position_ids, None
    renumbered = rule.number(position_ids, surviving, prefill.prompt, record.id_shift)
    if renumbered is not None:
        ids, shift = renumbered
        new_ids, record = ids, replace(record, id_shift=shift)

    kept = _kept_with(run, prefill, record)
    left = Survivors(surviving, order, new_ids)
    if found.one_pair and new_ids is None:
        left.taken.append((rotary, (pruned.cos, pruned.sin)))
    prefill.left.append(left)
    if step.stage.layer == BEFORE_THE_DECODER:
        prefill.embeds = hidden_states
    candidates = found.in_prompt(found.plan.visual_index)
    selection = _selection_of(prefill, surviving, ids, candidates, pruned.scores)
    return Dropped(survivors, record, kept, selection)


def _unpruned_ids(run: DecoderRun, prefill: Prefill, device: torch.device) -> torch.Tensor:
    """[B, Q] or [A, B, Q], the ids of all rows of the forward."""
    ids = prefill.position_ids.to(device)
    return ids.expand(*ids.shape[:-2], run.rows.batch, run.rows.queries).contiguous()


def _rows_found(
    run: DecoderRun,
    prefill: Prefill,
    step: Drop,
    hidden_states: torch.Tensor,
    position_ids: torch.Tensor,
    rotary: Any,
) -> RowsFound:
    """The rows that ``step`` finds, as the operator takes them."""
    device, earlier = hidden_states.device, run.survivors
    index = None if earlier is None else earlier.rows
    plan = plan_of(prefill.prompt, step, index).to(device)
    index = None if index is None else index.to(device)
    # The operator gathers one cos and sin of three dimensions. Others are gathered by `later_layers.inputs.shorten`, as the
    # layers bring them; here an empty pair stands in.
    cos = sin = hidden_states.new_empty(1, plan.visual.shape[1], 1)
    one_pair = isinstance(rotary, tuple) and len(rotary) == 2 and all(x.dim() == 3 for x in rotary)
    if earlier is not None:
        rotary = survivors_of(run.rows, earlier, "position_embeddings", rotary)
    if one_pair:
        cos, sin = rotary
    cos, sin = (x.to(device).expand(run.rows.batch, -1, -1) for x in (cos, sin))
    # Some M-RoPE models count in floats. The ids in the state stay what they are; the operator gathers integers.
    ids = position_ids.long()
    ids = ids if index is None else take_values(ids, index)
    return RowsFound(plan, index, (hidden_states, cos, sin, ids, plan.visual_index), rotary, one_pair)


def _record_of(run: DecoderRun, prefill: Prefill, step: Drop, surviving: torch.Tensor) -> KeptRows:
    """What the layers after ``step`` hold, with the rows ``surviving`` [B, L] of the prompt."""
    # A last row that is padding stays for its logits, but nobody may attend to it.
    real = prefill.prompt.real.to(surviving.device)
    alive = (surviving >= 0) & real.gather(1, surviving.clamp(min=0))
    positions = torch.where(alive, surviving + prefill.past, -1)
    return extend(
        None if run.before is None else run.before.stages[prefill.done],
        step.stage.layer,
        positions[:, : positions.shape[1] - prefill.drafts],
        past=prefill.past,
        queries=run.rows.queries - prefill.drafts,
        real=run.rows.real,
        dense=step.dense,
    )


def _kept_with(run: DecoderRun, prefill: Prefill, record: KeptRows) -> KeptTokens:
    """What all layers hold, once those after this stage hold what ``record`` says."""
    before = () if run.before is None else run.before.stages
    already = () if run.kept is None else run.kept.stages[: prefill.done]
    whole = not any(asks_for_text(each.stage) for each in prefill.drops) and not any(
        prefill.prompt.ends_in_image
    )
    return KeptTokens((*already, record, *before[prefill.done + 1 :]), run.config.ids, whole)


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


def _score_and_prune(run: DecoderRun, prefill: Prefill, step: Drop, found: RowsFound) -> PrunedTokens:
    if step.chosen is not None:
        device = found.tokens[0].device
        return _prune_chosen(step, found, step.chosen.score.to(device), step.chosen.stays.to(device))
    plan, stage, attention = found.plan, step.stage, None
    if stage.score in ATTENTION_SCORES:
        attention = attention_of(run, prefill, stage, plan, found.rotary)
        if attention.plain and step.places is None and plan.stays is None:
            return _prune_fused(step, found, attention)
    prompt_rows = found.in_prompt(plan.visual_index)
    if attention is not None:
        scores = scores_by_attention(stage, plan, attention)
    else:
        scores = scores_without_attention(run, prefill, step, plan, prompt_rows)
    if step.places is not None and stage.coverage != "topk":
        chosen = step.places.choose(
            scores, plan.visual_index, prompt_rows, plan.keep, stage.coverage, max(step.keep)
        )
        return _prune_chosen(step, found, scores, chosen > 0)
    if plan.stays is not None:
        return _prune_chosen(step, found, scores, _best(scores, plan, max(step.keep)))
    return _prune_by_score(step, found, scores, plan.keep)


def _prune_fused(step: Drop, found: RowsFound, attention: Attention) -> PrunedTokens:
    """Score, select and gather in one operator."""
    return prune_tokens(
        attention.query,
        attention.key,
        *found.tokens,
        found.plan.keep,
        rows=found.plan.rows,
        attention_mask=attention.columns,
        scale=attention.scale,
        length=step.length,
    )


def _prune_by_score(step: Drop, found: RowsFound, scores: torch.Tensor, keep: torch.Tensor) -> PrunedTokens:
    """Keep the ``keep`` [B] best of ``scores`` [B, V]."""
    real = found.plan.real if found.plan.padded else None
    return prune_by_score(scores, *found.tokens, keep, attention_mask=real, length=step.length)


def _prune_chosen(step: Drop, found: RowsFound, scores: torch.Tensor, chosen: torch.Tensor) -> PrunedTokens:
    """Keep what is ``chosen``, [B, V] bool, and what stays in any case; report ``scores`` [B, V]."""
    plan, keep = found.plan, found.plan.keep
    if plan.stays is not None:
        chosen = chosen | plan.stays
        keep = chosen.sum(dim=1)
    return _prune_by_score(step, found, chosen.float(), keep)._replace(scores=scores)


def _best(scores: torch.Tensor, plan: Plan, most: int) -> torch.Tensor:
    """[B, V] bool, the ``plan.keep`` best of each sample, by the operator's own rule."""
    scores = torch.where(plan.visual_index < 0, torch.nan, scores)  # filler comes last of all
    index = topk_indices(scores, plan.keep, length=most)
    chosen = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    return chosen.scatter(1, torch.where(index < 0, scores.shape[1], index), True)[:, :-1]
