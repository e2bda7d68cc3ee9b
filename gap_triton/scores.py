"""What ranks the visual tokens at a decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gap_kernels import visual_importance

from .attention import NAME
from .config import Stage
from .draw import draw
from .models import sliding_window
from .parallel import mean_over_ranks, tensor_parallel_group
from .prompt import looks_ahead
from .state import ForwardState, Plan
from .unrotated import unrotated


@dataclass(frozen=True)
class Attention:
    """What the scoring layer's attention left, cut down to the prompt.

    Attributes:
        query: [B, Hq, S, D].
        key: [B, Hkv, K, D], earlier columns first.
        columns: [B, K] bool, False at padding and filler; None = all.
        mask: The model's own mask [B or 1, 1, S, K'], None where it made none.
        scale: Factor of ``q k^T``, None = ``D ** -0.5``.
        window: Sliding window of the layer where it hides columns, else None.
        ahead: A scoring row may see later ones.
        group: The process group over which heads are split, None = all are here.
        plain: ``prune_tokens`` computes this score by itself.
    """

    query: torch.Tensor
    key: torch.Tensor
    columns: torch.Tensor | None
    mask: torch.Tensor | None
    scale: float | None
    window: int | None
    ahead: bool
    group: Any
    plain: bool


def attention_of(state: ForwardState, stage: Stage, plan: Plan) -> Attention:
    """Query, key and mask of the layer that scores for ``stage``, whose rows ``plan`` describes."""
    query, key = state.query, state.key
    if query is None or key is None:
        raise RuntimeError(
            f"layer {stage.layer} ran without calling the attention function '{NAME}', so nothing was scored: set "
            'attn_implementation="gap_triton" for the text model'
        )
    assert state.prompt is not None
    assert isinstance(state.past, int)
    # A static cache hands over its whole buffer, and behind the prompt there may be drafts.
    rows, prompt = plan.visual.shape[1], state.prompt.visual.shape[1]
    drafts = state.queries - prompt
    held = state.kept.stages[state.done - 1] if state.done and state.kept is not None else None
    columns = state.past + prompt if held is None else held.index.shape[1]
    query = query[:, :, :rows]
    key = key[:, :, : min(key.shape[2], columns + drafts) - drafts]
    real = None
    if held is not None:
        real = None if held.dense else (held.index >= 0)[:, -key.shape[2] :].to(plan.real.device)
    elif state.real is not None:
        real = state.real[:, :columns][:, -key.shape[2] :].to(plan.real.device)
    window = sliding_window(state.attachment.text.config, stage.layer)
    window = window if window is not None and window < key.shape[2] else None
    # The last row sees all that comes before it, whatever the model's mask; other rows may see later ones too.
    mask = state.mask[:, :, :rows] if isinstance(state.mask, torch.Tensor) else None
    ahead = plan.rows.shape[1] > 1 and looks_ahead(mask, plan.real)
    group = tensor_parallel_group(state.attachment, query)
    if stage.score == "unrotated":
        # Keys of earlier turns were rotated long ago; this turn's tokens are compared among themselves.
        key = key[:, :, -rows:]
        real = None if real is None else real[:, -rows:]
        query, key = unrotated(state, query, key)
    plain = not ahead and window is None and group is None and stage.score != "key_norm"
    return Attention(query, key, real, mask, state.scale, window, ahead, group, plain)


def scores_of(
    state: ForwardState, stage: Stage, plan: Plan, where: torch.Tensor, asked: Attention | None
) -> torch.Tensor:
    """[B, V] float32, the score of each visual token that ``plan`` names.

    Args:
        state: The running forward.
        stage: What ranks.
        plan: Rows that the stage finds.
        where: [B, V] int64, the same tokens by row of the prompt, -1 = filler.
        asked: What the layer's attention left; None for scores that ask none.
    """
    if stage.score == "random":
        drawn = draw(state.config.seed, state.done, plan.visual_index.shape[1])
        return drawn.to(plan.visual.device).repeat(plan.visual_index.shape[0], 1)
    if stage.score == "spatial":
        assert state.places is not None
        return -state.places.order_of(where).float()
    assert asked is not None
    if stage.score == "key_norm":
        squares = asked.key[:, :, -plan.visual.shape[1] :].float().square().sum(dim=(1, 3))  # [B, S]
        if asked.group is not None:
            squares = mean_over_ranks(squares, asked.group)
        return squares.sqrt().gather(1, plan.visual_index.clamp(min=0))
    if not asked.ahead and asked.window is None:
        scores = visual_importance(
            asked.query,
            asked.key,
            plan.visual_index,
            rows=plan.rows,
            attention_mask=asked.columns,
            scale=asked.scale,
        ).float()
    else:
        scores = _by_what_rows_see(asked, plan)
    return scores if asked.group is None else mean_over_ranks(scores, asked.group)


def _by_what_rows_see(asked: Attention, plan: Plan) -> torch.Tensor:
    """Importance where rows see other columns than those up to their own."""
    query, key, rows = asked.query, asked.key, plan.rows
    total = torch.zeros_like(plan.visual_index, dtype=torch.float32)
    for row in rows.split(1, dim=1):  # [B, 1]
        seen = _columns_seen(asked.mask, row, query.shape[2], key.shape[2], asked.window)
        seen = seen if asked.columns is None else seen & asked.columns
        asking, where = query, row
        if asked.ahead:
            # The operator shows a row the keys up to its own. In the place of the last row it sees all that `seen` says.
            source = row.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            asking = torch.cat([query[:, :, :-1], query.gather(2, source)], dim=2)
            where = torch.where(row < 0, -1, query.shape[2] - 1)
        total += visual_importance(
            asking, key, plan.visual_index, rows=where, attention_mask=seen, scale=asked.scale
        )
    return total / (rows >= 0).sum(dim=1, keepdim=True)


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
