"""Dropping: rank the visual tokens, keep the best in order, and note what was kept."""

from __future__ import annotations

from typing import Any

import torch
from gap_kernels import PrunedTokens, prune_by_score, prune_tokens, visual_importance

from .attention import NAME
from .ids import compact, score_order
from .kept import extend, store
from .models import sliding_window
from .prompt import looks_ahead
from .selection import Selection
from .state import ForwardState, Plan, remember_selection


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
    batch, rows, _ = hidden_states.shape
    device = hidden_states.device
    state.plan = plan = plan.to(device)
    rotary = kwargs.get("position_embeddings")
    # The operator gathers one cos and sin of three dimensions. Others are gathered by `later.shorten`, as the layers
    # bring them; here an empty pair stands in.
    cos = sin = hidden_states.new_empty(1, rows, 1)
    one_pair = isinstance(rotary, tuple) and len(rotary) == 2 and all(x.dim() == 3 for x in rotary)
    if rotary is not None and one_pair:
        cos, sin = rotary
    cos, sin = (x.to(device).expand(batch, -1, -1) for x in (cos, sin))
    assert state.position_ids is not None
    position_ids = state.position_ids.to(device)
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch, rows).contiguous()
    # Some M-RoPE models count in floats. The ids in the state stay what they are; the operator gathers integers.
    pruned = _score_and_prune(
        state, plan, (hidden_states, cos, sin, position_ids.long(), plan.visual_index, plan.keep)
    )

    before = state.kept
    # A last row that is padding stays for its logits, but nobody may attend to it.
    alive = (pruned.index >= 0) & plan.real.gather(1, pruned.index.clamp(min=0))
    positions = torch.where(alive, pruned.index + state.past, -1)
    state.kept = kept = extend(state, positions, plan.dense)
    store(kwargs.get("past_key_values"), kept)

    state.slots = state.survivors = pruned.index
    new_ids, survivors = pruned.position_ids, pruned.hidden_states
    if state.config.ids == "permuted":
        state.survivors = score_order(pruned.index, plan.visual, plan.visual_index, pruned.scores)
        source = state.survivors.clamp(min=0)
        survivors = hidden_states.gather(1, source[..., None].expand_as(survivors))
    if state.config.ids != "kept":
        shift = None if before is None else before.id_shift
        new_ids, kept.id_shift = compact(position_ids, pruned.index, plan.real, shift)
        state.new_ids = new_ids
    elif one_pair:
        state.memo[id(rotary)] = (rotary, (pruned.cos, pruned.sin))
    remember_selection(
        state.attachment, Selection(pruned.index, new_ids, plan.visual_index, pruned.scores, plan.visual)
    )
    state.query = state.key = state.mask = None
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
    key = key[:, :, : state.past + hidden_states.shape[1]]  # a static cache hands over its whole buffer
    columns = _real_columns(state, plan, key.shape[2])
    window = sliding_window(state.attachment.text.config, state.config.layer)
    rows, scale = plan.rows, state.scale
    # The last row sees all that comes before it, whatever the model's mask; other rows may see later ones too.
    ahead = rows.shape[1] > 1 and looks_ahead(state.mask, plan.real)
    if not ahead and (window is None or window >= key.shape[2]):
        return prune_tokens(
            query, key, *tokens, rows=rows, attention_mask=columns, scale=scale, length=plan.length
        )
    total = torch.zeros_like(plan.visual_index, dtype=torch.float32)
    for row in rows.split(1, dim=1):  # [B, 1]
        seen = _columns_seen(state, row, key.shape[2], window)
        seen = seen if columns is None else seen & columns
        asking, where = query, row
        if ahead:
            # The operator shows a row the keys up to its own. In the place of the last row it sees all that `seen` says.
            source = row.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            asking = torch.cat([query[:, :, :-1], query.gather(2, source)], dim=2)
            where = torch.where(row < 0, -1, query.shape[2] - 1)
        total += visual_importance(
            asking, key, plan.visual_index, rows=where, attention_mask=seen, scale=scale
        )
    scores = total / (rows >= 0).sum(dim=1, keepdim=True)
    return prune_by_score(scores, *tokens, attention_mask=real, length=plan.length)


def _columns_seen(state: ForwardState, row: torch.Tensor, columns: int, window: int | None) -> torch.Tensor:
    """[B, columns] bool: what query row ``row`` [B, 1] of each sample sees, by the model's mask or else by the window."""
    if isinstance(state.mask, torch.Tensor):
        mask = state.mask[:, 0, :, :columns].expand(row.shape[0], -1, -1)
        mask = mask.gather(1, row.clamp(min=0)[..., None].expand(-1, -1, mask.shape[2]))[:, 0]
        return mask if mask.dtype == torch.bool else mask == 0
    end = row + columns - state.queries
    column = torch.arange(columns, device=row.device)
    return (column <= end) & (column > end - (columns if window is None else window))


def _real_columns(state: ForwardState, plan: Plan, columns: int) -> torch.Tensor | None:
    """[B, columns] bool: the key columns, earlier ones first, that are no padding; None = all."""
    if state.real is None:
        return None
    return state.real[:, -columns:].to(plan.real.device)
