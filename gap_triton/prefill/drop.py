"""Dropping: rank the visual tokens, keep the best in order, and record what was kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from gap_kernels import PrunedTokens, prune_by_score, prune_tokens, topk_indices
from gap_kernels.prune.coverage import is_short

from ..config import ATTENTION_SCORES, BEFORE_THE_DECODER, Stage, needs_text
from ..kv_cache.kept_tokens import KeptRows, KeptTokens, extend
from ..later_layers.inputs import take_survivors
from ..selection import Selection
from ..state import DecoderRun, Drop, Plan, Prefill, Survivors, VisionSelection
from ..strategies import choose
from ..strategies.by_features import BY_FEATURES
from ..strategies.rows import members, rows_at
from .plan import plan_of
from .position_ids import ID_RULES
from .prompt import position_ids_of
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
class StageRows:
    """The rows that a stage finds: S of them, all Q of the forward in the first stage.

    Attributes:
        plan: What is to be dropped from them.
        earlier: What the stage before left, of which these are the rows; None where they are all of the prompt.
        tokens: Their hidden states [B, S, C], cos and sin [B, S, D], position ids [B, S] or [A, B, S], and visual rows.
        has_cos_sin: ``cos`` and ``sin`` are the layer's own, and no empty stand-ins.
    """

    plan: Plan
    earlier: Survivors | None
    tokens: FiveTensors
    has_cos_sin: bool

    def to_prompt_rows(self, rows: torch.Tensor, dense: bool) -> torch.Tensor:
        """Return the rows of the prompt, [B, N], from ``rows`` [B, N] among these; -1 stays -1, and ``dense`` has none."""
        if self.earlier is None:
            return rows
        index = self.earlier.index.to(rows.device)
        return (
            index.gather(1, rows) if dense else torch.where(rows < 0, -1, index.gather(1, rows.clamp(min=0)))
        )


def drop_tokens(
    run: DecoderRun, prefill: Prefill, drop: Drop, hidden_states: torch.Tensor, kwargs: dict[str, Any]
) -> Dropped:
    """Drop tokens between the pruning layer and the next.

    Args:
        run: The run of the decoder.
        prefill: Its prompt; gets the survivors, with ids and rotary embeddings for the later layers.
        drop: What it drops.
        hidden_states: [B, S, C], output of the pruning layer.
        kwargs: Keyword arguments of the first later layer.
    """
    rotary = kwargs.get("position_embeddings")
    position_ids = _unpruned_ids(run, prefill, hidden_states.device, kwargs.get("position_ids"))
    rows = _stage_rows(run, prefill, drop, hidden_states, position_ids, rotary)
    pruned = _score_and_prune(run, prefill, drop, rows)
    prefill.scoring = prefill.rotary = None
    index = rows.to_prompt_rows(pruned.index, drop.dense)
    record = _record_of(run, prefill, drop, index)
    rule = ID_RULES[run.config.ids]
    hidden, order = pruned.hidden_states, rule.order(index, rows.plan, pruned.scores)
    if order is not index:
        hidden = hidden_states.gather(1, order.clamp(min=0)[..., None].expand_as(hidden))
    ids, new_ids = pruned.position_ids, None
    renumbered = rule.number(position_ids, index, prefill.prompt, record.id_shift)
    if renumbered is not None:
        ids, shift = renumbered
        new_ids, record = ids, replace(record, id_shift=shift)

    kept = _kept_with(run, prefill, record)
    survivors = Survivors(index, order, new_ids, pruned.position_ids, drop.dense)
    if rows.has_cos_sin and new_ids is None:
        survivors.arguments.append((rotary, (pruned.cos, pruned.sin)))
    shared: torch.Tensor | None = kwargs.get("position_ids")
    if isinstance(shared, torch.Tensor) and prefill.position_ids is shared and shared.dtype == torch.int64:
        survivors.arguments.append((shared, pruned.position_ids))
    prefill.survivors.append(survivors)
    if drop.stage.layer == BEFORE_THE_DECODER:
        prefill.embeds = hidden_states
    selection = _selection_of(prefill, index, ids, rows.plan.visual_index, pruned.scores)
    return Dropped(hidden, record, kept, selection)


def _unpruned_ids(run: DecoderRun, prefill: Prefill, device: torch.device, of_layer: Any) -> torch.Tensor:
    """[B, Q] or [A, B, Q], the ids of all rows of the forward: those ``of_layer`` where the decoder made them itself."""
    rows = run.rows
    if prefill.position_ids is None:
        counted = isinstance(of_layer, torch.Tensor) and of_layer.shape in (
            (1, rows.queries),
            (rows.batch, rows.queries),
        )
        given = of_layer if counted else None
        prefill.position_ids = position_ids_of(given, prefill.past, rows.queries, device)
    ids = prefill.position_ids.to(device)
    return ids.expand(*ids.shape[:-2], rows.batch, rows.queries)


def _stage_rows(
    run: DecoderRun,
    prefill: Prefill,
    drop: Drop,
    hidden_states: torch.Tensor,
    position_ids: torch.Tensor,
    rotary: Any,
) -> StageRows:
    """The rows that ``drop`` finds, as the operator takes them."""
    device, earlier = hidden_states.device, run.survivors
    plan = plan_of(prefill, drop, earlier).to(device)
    # The operator gathers one cos and sin of three dimensions. Others are gathered by `later_layers.inputs.shorten`, as the
    # layers bring them; here an empty pair stands in.
    cos = sin = hidden_states.new_empty(1, plan.visual.shape[1], 1)
    has_cos_sin = isinstance(rotary, tuple) and len(rotary) == 2 and all(x.dim() == 3 for x in rotary)
    if earlier is not None:
        rotary = take_survivors(run.rows, earlier, "position_embeddings", rotary)
    if has_cos_sin:
        cos, sin = rotary
    cos, sin = (x.to(device).expand(run.rows.batch, -1, -1) for x in (cos, sin))
    # Some M-RoPE models count in floats. The ids in the state stay what they are; the operator gathers integers.
    ids = position_ids.long() if earlier is None else earlier.ids.to(device)
    return StageRows(plan, earlier, (hidden_states, cos, sin, ids, plan.visual_index), has_cos_sin)


def _record_of(run: DecoderRun, prefill: Prefill, drop: Drop, index: torch.Tensor) -> KeptRows:
    """What the layers after ``drop`` hold, with the rows ``index`` [B, L] of the prompt."""
    positions = index if prefill.past == 0 else index + prefill.past
    if not all(prefill.prompt.last_is_real):
        # A last row that is padding stays for its logits, but no row may attend to it.
        real = prefill.prompt.real.to(index.device)
        positions = torch.where((index >= 0) & real.gather(1, index.clamp(min=0)), positions, -1)
    elif prefill.past and not drop.dense:
        positions = torch.where(index >= 0, positions, -1)
    return extend(
        None if run.kept_before is None else run.kept_before.stages[prefill.done],
        drop.stage.layer,
        positions[:, : positions.shape[1] - prefill.drafts],
        past=prefill.past,
        queries=run.rows.queries - prefill.drafts,
        real=run.rows.real if prefill.past else None,
        dense=drop.dense,
    )


def _kept_with(run: DecoderRun, prefill: Prefill, record: KeptRows) -> KeptTokens:
    """What all layers hold, once those after this stage hold ``record``."""
    before = () if run.kept_before is None else run.kept_before.stages
    done = () if run.kept is None else run.kept.stages[: prefill.done]
    text_independent = not any(needs_text(each.stage) for each in prefill.drops) and not any(
        prefill.prompt.ends_in_image
    )
    return KeptTokens((*done, record, *before[prefill.done + 1 :]), run.config.ids, text_independent)


def _selection_of(
    prefill: Prefill,
    index: torch.Tensor,
    ids: torch.Tensor,
    candidates: torch.Tensor,
    scores: torch.Tensor,
) -> Selection:
    """What a stage kept, with its ``candidates`` by row among those that it found: nobody may ask for them."""
    length = index.shape[1] - prefill.drafts
    return Selection(
        index[:, :length],
        ids[..., :length],
        scores,
        prefill.prompt.visual[:, : prefill.prompt.visual.shape[1] - prefill.drafts],
        candidates,
        before=prefill.selection,
    )


def _score_and_prune(run: DecoderRun, prefill: Prefill, drop: Drop, rows: StageRows) -> PrunedTokens:
    if drop.selection is not None:
        return _prune_selected(drop, rows, drop.selection)
    plan, stage = rows.plan, drop.stage
    prompt_rows = None
    if rows.earlier is not None and drop.grid_positions is not None:
        prompt_rows = rows.to_prompt_rows(plan.visual_index, plan.filled)
    compares = stage.coverage in BY_FEATURES
    if stage.score not in ATTENTION_SCORES:
        scores = scores_without_attention(run, prefill, drop, plan, prompt_rows)
    else:
        attention = attention_of(run, prefill, stage, plan, prefill.rotary)
        if attention.plain and plan.stays is None and not compares and _is_short(stage.spread):
            return _prune_fused(drop, rows, attention, _covering_of(drop, rows, prompt_rows))
        scores = scores_by_attention(stage, plan, attention)
    if compares:
        selected = _chosen_by_features(rows.tokens[0], plan, scores, stage, max(drop.keep))
        return _prune_chosen(drop, rows, scores, selected)
    covering = _covering_of(drop, rows, prompt_rows)
    if not _is_short(stage.spread):
        return _prune_chosen(drop, rows, scores, _best(scores, plan, max(drop.keep), covering))
    return _prune_best(drop, rows, scores, covering)


def _is_short(spread: float | None) -> bool:
    """Return whether the operator takes ``spread``."""
    return spread is None or is_short(spread)


def _covering_of(drop: Drop, rows: StageRows, prompt_rows: torch.Tensor | None) -> dict[str, Any]:
    """The coverage of the stage with what it needs, as keyword arguments of `gap_kernels.prune_tokens`.

    Args:
        drop: The stage.
        rows: The rows that it finds.
        prompt_rows: [B, V] int64, the visual ones by row of the prompt, -1 = filler; None where they are all of it,
            or nothing asks.
    """
    device, positions = rows.plan.visual_index.device, drop.grid_positions
    if drop.stage.coverage == "region" and positions is not None:
        neighbours = positions.neighbours_of(prompt_rows, device)
        return {"coverage": "region", "neighbours": neighbours, "per_region": drop.stage.per_region}
    if drop.stage.coverage == "stride" and positions is not None:
        order = positions.order_of(prompt_rows, device)
        return {"coverage": "stride", "order": order, "spread": drop.stage.spread}
    return {}


def _prune_selected(drop: Drop, rows: StageRows, selection: VisionSelection) -> PrunedTokens:
    """Keep what was selected before the decoder."""
    device = rows.tokens[0].device
    scores = selection.score.to(device)
    ranks = scores if selection.ranks is None else selection.ranks.to(device)
    return _prune_best(drop, rows, ranks, {})._replace(scores=scores)


def _prune_fused(drop: Drop, rows: StageRows, attention: Attention, covering: dict[str, Any]) -> PrunedTokens:
    """Score, select and gather in one operator."""
    return prune_tokens(
        attention.query,
        attention.key,
        *rows.tokens,
        rows.plan.keep,
        rows=rows.plan.rows,
        attention_mask=attention.columns,
        scale=attention.scale,
        length=drop.length,
        **covering,
    )


def _prune_best(drop: Drop, rows: StageRows, scores: torch.Tensor, covering: dict[str, Any]) -> PrunedTokens:
    """Keep as many as the stage says by ``scores`` [B, V] and a coverage, and what stays in any case."""
    if rows.plan.stays is not None:
        return _prune_chosen(drop, rows, scores, _best(scores, rows.plan, max(drop.keep), covering))
    return _prune_by_score(drop, rows, scores, rows.plan.keep, covering)


def _prune_by_score(
    drop: Drop, rows: StageRows, scores: torch.Tensor, keep: int | torch.Tensor, covering: dict[str, Any]
) -> PrunedTokens:
    """Keep ``keep`` by ``scores`` [B, V] and a coverage, as many in all samples or [B]."""
    real = rows.plan.real if rows.plan.padded else None
    return prune_by_score(scores, *rows.tokens, keep, attention_mask=real, length=drop.length, **covering)


def _prune_chosen(drop: Drop, rows: StageRows, scores: torch.Tensor, selected: torch.Tensor) -> PrunedTokens:
    """Keep what is ``selected``, 1 in [B, V] float32, and what stays in any case; report ``scores`` [B, V]."""
    plan, keep = rows.plan, rows.plan.keep
    if plan.stays is not None:
        is_kept = (selected > 0) | plan.stays
        selected, keep = is_kept.float(), is_kept.sum(dim=1)
    return _prune_by_score(drop, rows, selected, keep, {})._replace(scores=scores)


def _chosen_by_features(
    hidden_states: torch.Tensor, plan: Plan, scores: torch.Tensor, stage: Stage, most: int
) -> torch.Tensor:
    """[B, V] float32, 1 at what ``stage`` chooses by ``hidden_states`` [B, S, C] and ``scores`` [B, V], else 0."""
    index = plan.visual_index
    mask = None if plan.filled else index >= 0
    index = index if mask is None else index.clamp(min=0)
    given = {"features": rows_at(hidden_states, index), "exponent": stage.exponent, "mask": mask}
    index = choose(scores, plan.keep, stage.coverage, **given, length=most)  # type: ignore[arg-type]
    if mask is None and not isinstance(plan.keep, torch.Tensor):
        return torch.zeros_like(scores).scatter_(1, index, 1.0)  # there is no filler
    return members(index, scores.shape[1]).float()


def _best(scores: torch.Tensor, plan: Plan, most: int, covering: dict[str, Any]) -> torch.Tensor:
    """[B, V] float32, 1 at the ``plan.keep`` that a coverage chooses of each sample, by the operator's own rule, else 0."""
    if covering:
        scores = torch.where(plan.visual_index < 0, -torch.inf, scores)  # which is filler's
        index = choose(scores, plan.keep, length=most, **covering)
    else:
        scores = torch.where(plan.visual_index < 0, torch.nan, scores)  # filler comes last of all
        index = topk_indices(scores, plan.keep, length=most)
    selected = scores.new_zeros(scores.shape[0], scores.shape[1] + 1)
    return selected.scatter_(1, torch.where(index < 0, scores.shape[1], index), 1.0)[:, :-1]
