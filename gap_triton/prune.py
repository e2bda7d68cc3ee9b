"""Dropping: rank the visual tokens, keep the best in order, and note what was kept."""

from __future__ import annotations

from typing import Any

import torch
from gap_kernels import PrunedTokens, prune_by_score, prune_tokens, visual_importance

from .attention import NAME
from .ids import compact, score_order
from .kept import extend, store
from .models import sliding_window
from .parallel import mean_over_ranks, tensor_parallel_group
from .selection import Selection
from .state import ForwardState, Plan, remember_selection
from .static import fit


def drop(
    state: ForwardState, plan: Plan, hidden_states: torch.Tensor, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Drop what ``plan`` says, between the pruning layer and the next.

    Args:
        state: The running forward; takes note of survivors, ids and rotary embeddings for the later layers.
        plan: What to drop.
        hidden_states: [B, Q, C], output of the pruning layer.
        kwargs: Keyword arguments of the first later layer.

    Returns:
        The surviving rows, [B, L, C], filler on the left.
    """
    batch, queries, _ = hidden_states.shape
    device = hidden_states.device
    state.plan = plan = plan.to(device)
    cos, sin = (x.to(device).expand(batch, -1, -1) for x in kwargs["position_embeddings"])
    position_ids = kwargs["position_ids"].to(device).expand(batch, -1)
    prompt = plan.visual.shape[1]
    pruned = _score_and_prune(
        state,
        plan,
        (*(x[:, :prompt] for x in (hidden_states, cos, sin, position_ids)), plan.visual_index, plan.keep),
    )

    before = state.kept
    # A last row that is padding stays for its logits, but nobody may attend to it.
    alive = (pruned.index >= 0) & plan.real.gather(1, pruned.index.clamp(min=0))
    positions = torch.where(alive, pruned.index + state.past, -1)
    state.kept = kept = extend(state, positions, plan.dense)
    store(kwargs.get("past_key_values"), kept)

    def with_drafts(rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return rows if queries == prompt else torch.cat([rows, source[:, prompt:]], dim=1)

    row_numbers = torch.arange(queries, device=device).expand(batch, -1)
    state.slots = state.survivors = with_drafts(pruned.index, row_numbers)
    new_ids, survivors = pruned.position_ids, with_drafts(pruned.hidden_states, hidden_states)
    if state.config.ids == "permuted":
        order = score_order(pruned.index, plan.visual, plan.visual_index, pruned.scores)
        state.survivors = with_drafts(order, row_numbers)
        rows = state.survivors.clamp(min=0)
        survivors = hidden_states.gather(1, rows[..., None].expand_as(survivors))
    if state.config.ids != "kept":
        shift = None if before is None else before.id_shift
        new_ids, kept.id_shift = compact(position_ids[:, :prompt], pruned.index, plan.real, shift)
        layer_ids = with_drafts(new_ids, position_ids - kept.id_shift[:, None])
        state.memo["rotary"] = state.attachment.text.rotary_emb(survivors, layer_ids)
    else:
        layer_ids = with_drafts(new_ids, position_ids)
        state.memo["rotary"] = (with_drafts(pruned.cos, cos), with_drafts(pruned.sin, sin))
    state.memo["position_ids"] = layer_ids
    fit(kwargs.get("past_key_values"), kept, queries - survivors.shape[1], state.past)
    remember_selection(
        state.attachment, Selection(pruned.index, new_ids, plan.visual_index, pruned.scores, plan.visual)
    )
    state.query = state.key = None
    return survivors


def _score_and_prune(state: ForwardState, plan: Plan, tokens: tuple[torch.Tensor, ...]) -> PrunedTokens:
    """``tokens``: hidden states, cos, sin, position ids, visual index, keep."""
    hidden_states = tokens[0]
    real = plan.real if plan.padded else None
    if state.config.score == "random":
        generator = torch.Generator().manual_seed(state.config.seed)
        scores = torch.rand(plan.visual_index.shape, generator=generator).to(hidden_states.device)
        return prune_by_score(scores, *tokens, attention_mask=real, length=plan.length)
    query, key = state.query, state.key
    if query is None or key is None:
        raise RuntimeError(
            f"layer {state.config.layer} ran without calling the attention function '{NAME}', so nothing was scored: set "
            'attn_implementation="gap_triton" for the text model'
        )
    # A static cache hands over its whole buffer, and behind the prompt there may be drafts.
    prompt = hidden_states.shape[1]
    query = query[:, :, :prompt]
    key = key[:, :, : min(key.shape[2], state.past + state.queries) - (state.queries - prompt)]
    columns = _real_columns(state, plan, key.shape[2])
    window = sliding_window(state.attachment.text.config, state.config.layer)
    rows, scale = plan.rows, state.scale
    group = tensor_parallel_group(state.attachment, query)
    if group is None and (window is None or window >= key.shape[2]):
        return prune_tokens(
            query, key, *tokens, rows=rows, attention_mask=columns, scale=scale, length=plan.length
        )
    if window is None or window >= key.shape[2]:
        scores = visual_importance(
            query, key, plan.visual_index, rows=rows, attention_mask=columns, scale=scale
        )
    else:
        # Each scoring row sees the last `window` columns up to its own. A row outside of that is no padding.
        total = torch.zeros_like(plan.visual_index, dtype=torch.float32)
        for row in rows.split(1, dim=1):  # [B, 1]
            end = row + key.shape[2] - query.shape[2]
            seen = torch.arange(key.shape[2], device=key.device) > end - window
            seen = seen if columns is None else seen & columns
            total += visual_importance(
                query, key, plan.visual_index, rows=row, attention_mask=seen, scale=scale
            )
        scores = total / (rows >= 0).sum(dim=1, keepdim=True)
    if group is not None:
        scores = mean_over_ranks(scores, group)
    return prune_by_score(scores, *tokens, attention_mask=real, length=plan.length)


def _real_columns(state: ForwardState, plan: Plan, columns: int) -> torch.Tensor | None:
    """[B, columns] bool: the key columns, earlier ones first, that are no padding; None = all."""
    if state.real is None:
        return None
    return state.real[:, : state.past + plan.visual.shape[1]][:, -columns:].to(plan.real.device)
