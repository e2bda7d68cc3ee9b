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
from .prompt import looks_ahead
from .selection import Selection
from .state import ForwardState, Plan
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
    rotary = kwargs.get("position_embeddings")
    # The operator gathers one cos and sin of three dimensions. Others are gathered by `later.shorten`, as the layers
    # bring them; here an empty pair stands in.
    cos = sin = hidden_states.new_empty(1, queries, 1)
    one_pair = isinstance(rotary, tuple) and len(rotary) == 2 and all(x.dim() == 3 for x in rotary)
    if rotary is not None and one_pair:
        cos, sin = rotary
    cos, sin = (x.to(device).expand(batch, -1, -1) for x in (cos, sin))
    assert state.position_ids is not None
    position_ids = state.position_ids.to(device)
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch, queries).contiguous()
    prompt = plan.visual.shape[1]
    # Some M-RoPE models count in floats. The ids in the state stay what they are; the operator gathers integers.
    prompt_ids = position_ids[..., :prompt]
    pruned = _score_and_prune(
        state,
        plan,
        (
            *(x[:, :prompt] for x in (hidden_states, cos, sin)),
            prompt_ids.long(),
            plan.visual_index,
            plan.keep,
        ),
    )

    before = state.kept
    # A last row that is padding stays for its logits, but nobody may attend to it.
    alive = (pruned.index >= 0) & plan.real.gather(1, pruned.index.clamp(min=0))
    positions = torch.where(alive, pruned.index + state.past, -1)
    state.kept = kept = extend(state, positions, plan.dense)
    store(kwargs.get("past_key_values"), kept)

    def with_drafts(survivors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return survivors if queries == prompt else torch.cat([survivors, rows[:, prompt:]], dim=1)

    row_numbers = torch.arange(queries, device=device).expand(batch, -1)
    state.slots = state.survivors = with_drafts(pruned.index, row_numbers)
    new_ids, survivors = pruned.position_ids, with_drafts(pruned.hidden_states, hidden_states)
    if state.config.ids == "permuted":
        order = score_order(pruned.index, plan.visual, plan.visual_index, pruned.scores)
        state.survivors = with_drafts(order, row_numbers)
        source = state.survivors.clamp(min=0)
        survivors = hidden_states.gather(1, source[..., None].expand_as(survivors))
    if state.config.ids != "kept":
        shift = None if before is None else before.id_shift
        new_ids, kept.id_shift = compact(prompt_ids, pruned.index, plan.real, shift)
        state.new_ids = with_drafts(new_ids, position_ids - kept.id_shift[:, None])
    elif one_pair:
        state.taken.append((rotary, (with_drafts(pruned.cos, cos), with_drafts(pruned.sin, sin))))
    if state.past == 0:
        fit(kwargs.get("past_key_values"), kept)
    state.selection = Selection(pruned.index, new_ids, plan.visual_index, pruned.scores, plan.visual)
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
    # A static cache hands over its whole buffer, and behind the prompt there may be drafts.
    prompt = hidden_states.shape[1]
    query = query[:, :, :prompt]
    key = key[:, :, : min(key.shape[2], state.past + state.queries) - (state.queries - prompt)]
    columns = _real_columns(state, plan, key.shape[2])
    window = sliding_window(state.attachment.text.config, state.config.layer)
    rows, scale = plan.rows, state.scale
    # The last row sees all that comes before it, whatever the model's mask; other rows may see later ones too.
    mask = state.mask[:, :, :prompt] if isinstance(state.mask, torch.Tensor) else None
    ahead = rows.shape[1] > 1 and looks_ahead(mask, plan.real)
    narrow = window is not None and window < key.shape[2]
    group = tensor_parallel_group(state.attachment, query)
    if group is None and not ahead and not narrow:
        return prune_tokens(
            query, key, *tokens, rows=rows, attention_mask=columns, scale=scale, length=plan.length
        )
    if not ahead and not narrow:
        scores = visual_importance(
            query, key, plan.visual_index, rows=rows, attention_mask=columns, scale=scale
        )
    else:
        total = torch.zeros_like(plan.visual_index, dtype=torch.float32)
        for row in rows.split(1, dim=1):  # [B, 1]
            seen = _columns_seen(mask, row, prompt, key.shape[2], window)
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
    if group is not None:
        scores = mean_over_ranks(scores, group)
    return prune_by_score(scores, *tokens, attention_mask=real, length=plan.length)


def _columns_seen(
    mask: torch.Tensor | None, row: torch.Tensor, rows: int, columns: int, window: int | None
) -> torch.Tensor:
    """[B, columns] bool: what one of ``rows`` query rows, ``row`` [B, 1], sees by the model's mask or else by the window."""
    if mask is not None:
        mask = mask[:, 0, :, :columns].expand(row.shape[0], -1, -1)
        mask = mask.gather(1, row.clamp(min=0)[..., None].expand(-1, -1, mask.shape[2]))[:, 0]
        return mask if mask.dtype == torch.bool else mask == 0
    end = row + columns - rows
    column = torch.arange(columns, device=row.device)
    return (column <= end) & (column > end - (columns if window is None else window))


def _real_columns(state: ForwardState, plan: Plan, columns: int) -> torch.Tensor | None:
    """[B, columns] bool: the key columns, earlier ones first, that are no padding; None = all."""
    if state.real is None:
        return None
    return state.real[:, : state.past + plan.visual.shape[1]][:, -columns:].to(plan.real.device)
