"""What ranks the visual tokens at a decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gap_kernels import corrected_importance, visual_importance
from gap_kernels.corrected.reference import mean_of_best
from torch.nn.functional import pad

from ..config import Stage
from ..host import to_device
from ..introspect import NAME
from ..later_layers.masks import is_plain
from ..state import DecoderRun, Drop, Plan, Prefill
from ..strategies.draw import draw
from .parallel import mean_over_ranks, tensor_parallel_group
from .rope import Rope, rope_of
from .unrotated import BY_ROTATION, rotated_ones, unrotated

PRIORITY_HEADS, PUBLISHED_HEADS = 14, 32  # of SparseVLM+'s released code, for decoders of 7B
BLOCK = 1 << 22
"""How many attention logits are in memory at once where the rows have a mask of their own."""


@dataclass(frozen=True)
class Attention:
    """What the scoring layer's attention left.

    Attributes:
        query: [B, Hq, S, D].
        key: [B, Hkv, K, D], earlier columns first.
        columns: [B, K] bool, False at padding and filler; None = all.
        mask: [B or 1, Hq or 1, S, K], bool or additive, what the layer attended by; None where that is causal attention to
            ``columns``, which needs no mask.
        scale: Factor of ``q k^T``, None = ``D ** -0.5``.
        group: The process group over which heads are split, None = all are here.
        plain: ``prune_tokens`` computes this score by itself.
        rope: For ``"raters_corrected"``: how the layer turned its rows, if ``corrected_importance`` takes it; else None.
        ones: For ``"raters_corrected"`` where ``rope`` is None: equal queries and keys after RoPE, [B or 1, 1, S, D] each.
    """

    query: torch.Tensor
    key: torch.Tensor
    columns: torch.Tensor | None
    mask: torch.Tensor | None
    scale: float | None
    group: Any
    plain: bool
    rope: Rope | None = None
    ones: tuple[torch.Tensor, torch.Tensor] | None = None


def attention_of(run: DecoderRun, prefill: Prefill, stage: Stage, plan: Plan, rotary: Any) -> Attention:
    """Return query, key and mask of the layer that scores for ``stage``, for the rows of ``plan``; by its ``rotary``."""
    scoring = prefill.scoring
    if scoring is None:
        raise RuntimeError(
            f"layer {stage.layer} ran without calling the attention function '{NAME}', so nothing was scored: set "
            'attn_implementation="gap_triton" for the text model'
        )
    query, key = scoring.query, scoring.key
    rows = plan.visual.shape[1]
    total = prefill.past + run.rows.queries
    record = run.kept.stages[prefill.done - 1] if prefill.done and run.kept is not None else None
    columns = total if record is None else record.index.shape[1] + prefill.drafts
    key = key[:, :, :columns]  # a static cache hands over its whole buffer
    real = run.rows.real
    if record is not None:
        real = None if record.dense else pad(record.index >= 0, (0, prefill.drafts), value=True)
    if real is not None:
        real = real[:, :columns][:, -key.shape[2] :].to(plan.real.device)
    mask = None if is_plain(scoring.mask, total) else scoring.mask
    group = tensor_parallel_group(run.attachment, query)
    if stage.score == "unrotated":
        # Keys of earlier turns were rotated long ago; this turn's tokens are compared among themselves.
        mask = None if mask is None else mask[..., : key.shape[2]][..., -rows:]
        key = key[:, :, -rows:]
        real = None if real is None else real[:, -rows:]
        query, key = unrotated(scoring.module, run.attachment.text, rotary, query, key)
        # They compete among each other alone: the softmax is over visual columns.
        visual = plan.visual.to(key.device)
        real = visual if real is None else visual & real
        if mask is not None:
            mask = among(mask, visual)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
    rope = ones = None
    if stage.score == "raters_corrected":
        if group is not None:
            raise ValueError(
                "score='raters_corrected': it ranks by some of the heads, and these are split over devices; use "
                "score='raters'"
            )
        rope = rope_of(scoring.module, rotary, query) if mask is None else None
        ones = rotated_ones(scoring.module, rotary, query) if rope is None else None
    plain = mask is None and group is None and stage.score not in ("key_norm", *BY_ROTATION)
    return Attention(query, key, real, mask, scoring.scale, group, plain, rope, ones)


def among(mask: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return a mask [B or 1, H or 1, S, K], bool or additive, that also hides what is not of ``columns`` [B, K] bool."""
    shown = columns.to(mask.device)[:, None, None]
    if mask.dtype == torch.bool:
        return mask & shown
    return torch.where(shown, mask, torch.finfo(mask.dtype).min)


def scores_without_attention(
    run: DecoderRun, prefill: Prefill, drop: Drop, plan: Plan, prompt_rows: torch.Tensor | None
) -> torch.Tensor:
    """Return [B, V] float32, the score of each visual token of ``plan``: by an even spread over the image, or at random.

    Args:
        run: The run of the decoder.
        prefill: Its prompt.
        drop: The stage.
        plan: Rows that the stage finds.
        prompt_rows: [B, V] int64, the same tokens by row of the prompt, -1 = filler; None where they are all of it.
    """
    if drop.stage.score == "spatial" and drop.grid_positions is not None:
        return -drop.grid_positions.order_of(prompt_rows, plan.visual.device).float()
    random_scores = draw(run.config.seed, prefill.done, plan.visual_index.shape[1])
    return to_device(random_scores, plan.visual.device).repeat(plan.visual_index.shape[0], 1)


def scores_by_attention(stage: Stage, plan: Plan, attention: Attention) -> torch.Tensor:
    """Return [B, V] float32, the score of each visual token that ``plan`` names.

    Args:
        stage: What ranks.
        plan: Rows that the stage finds.
        attention: What the layer's attention left.
    """
    if stage.score == "key_norm":
        squares = attention.key[:, :, -plan.visual.shape[1] :].float().square().sum(dim=(1, 3))  # [B, S]
        if attention.group is not None:
            squares = mean_over_ranks(squares, attention.group)
        return squares.sqrt().gather(1, plan.visual_index.clamp(min=0))
    if attention.rope is not None:
        return corrected_importance(
            attention.query,
            attention.key,
            plan.visual_index,
            *attention.rope,
            priority_heads(attention),
            rows=plan.rows,
            attention_mask=attention.columns,
            scale=attention.scale,
        ).float()
    if attention.ones is not None:
        return importance_corrected(attention, attention.ones, plan.rows, plan.visual_index)
    if attention.mask is None:
        scores = visual_importance(
            attention.query,
            attention.key,
            plan.visual_index,
            rows=plan.rows,
            attention_mask=attention.columns,
            scale=attention.scale,
        ).float()
    else:
        scores = importance_by_mask(attention, attention.mask, plan.rows, plan.visual_index)
    return scores if attention.group is None else mean_over_ranks(scores, attention.group)


def importance_by_mask(
    attention: Attention, mask: torch.Tensor, rows: torch.Tensor, visual_index: torch.Tensor
) -> torch.Tensor:
    """Return `gap_kernels.visual_importance` of rows that attend by ``mask``, in bounded memory.

    Args:
        attention: Query, key and scale.
        mask: [B or 1, Hq or 1, S, K], bool, or additive with what the layer added to its logits, biases included.
        rows: [B, R] int64, the query rows to average, -1 = filler.
        visual_index: [B, V] int64, -1 = filler.

    Returns:
        [B, V] float32; 0 at filler.
    """
    heads = attention.query.shape[1]
    total: torch.Tensor | float = 0.0
    for _, weights in _weights(attention, mask, rows, visual_index):
        total = total + weights.sum(dim=(1, 2))
    total = total / (heads * (rows >= 0).sum(dim=1, keepdim=True).clamp(min=1))
    return torch.where(visual_index >= 0, total, 0.0).float()


def priority_heads(attention: Attention) -> int:
    """Return how many heads count for SparseVLM+: its share of those that there are, one at least."""
    return max(round(attention.query.shape[1] * PRIORITY_HEADS / PUBLISHED_HEADS), 1)


def importance_corrected(
    attention: Attention,
    ones: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    visual_index: torch.Tensor,
) -> torch.Tensor:
    """Return `gap_kernels.corrected_importance` of rows that attend by a mask, or are turned in another way.

    Args:
        attention: Query, key, mask and scale.
        ones: Equal queries and keys after RoPE, see `rotated_ones`.
        rows: [B, R] int64, the query rows to average, -1 = filler.
        visual_index: [B, V] int64, -1 = filler.

    Returns:
        [B, V] float32; 0 at filler.
    """
    batch, _, queries, channels = attention.query.shape
    mask = attention.mask
    if mask is None:
        columns = attention.key.shape[2]
        causal = torch.ones(queries, columns, dtype=torch.bool, device=attention.query.device)
        mask = causal.tril_(columns - queries)[None, None]
        mask = mask if attention.columns is None else among(mask, attention.columns)
    total: torch.Tensor | float = 0.0
    filler = visual_index < 0

    def at(vectors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        index = index.clamp(min=0)[:, None, :, None]
        return vectors.expand(batch, -1, -1, -1).gather(2, index.expand(-1, -1, -1, channels))

    queries_of_ones, keys_of_ones = ones
    visual_ones = at(keys_of_ones, visual_index).transpose(2, 3)  # [B, 1, D, V]
    for block, weights in _weights(attention, mask, rows, visual_index):
        by_rope = at(queries_of_ones, block) @ visual_ones * channels**-0.5  # [B, 1, r, V]
        total = total + (weights / by_rope).masked_fill_(weights == 0, 0.0).sum(dim=2)  # [B, H, V]
    assert isinstance(total, torch.Tensor)
    total = total.masked_fill_(filler[:, None], 0.0)
    mean = mean_of_best(total, priority_heads(attention)) / (rows >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    return mean.masked_fill_(filler, 0.0).float()


def _weights(
    attention: Attention, mask: torch.Tensor, rows: torch.Tensor, visual_index: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield some of ``rows`` [B, r] at a time, and what they attend to visual tokens with, [B, H, r, V]; 0 at filler."""
    query, key = attention.query, attention.key
    batch, heads, queries, channels = query.shape
    columns = key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = channels**-0.5 if attention.scale is None else attention.scale
    mask = mask.to(query.device).expand(batch, *mask.shape[1:])
    visual_columns = (visual_index.clamp(min=0) + columns - queries)[:, None, None]
    with torch.autocast(query.device.type, enabled=False):
        keys = key.to(dtype).transpose(2, 3)[:, :, None]  # [B, Hkv, 1, D, K]
        for block in rows.split(max(1, BLOCK // (batch * heads * columns)), dim=1):
            source = block.clamp(min=0)[:, None, :, None]  # [B, 1, r, 1]
            block_query = query.gather(2, source.expand(-1, heads, -1, channels)).to(dtype) * scale
            logits = (block_query.unflatten(1, (key.shape[1], -1)) @ keys).flatten(1, 2)  # [B, Hq, r, K]
            block_mask = mask.gather(2, source.expand(-1, mask.shape[1], -1, columns))
            logits = (
                logits.masked_fill(~block_mask, -torch.inf)
                if block_mask.dtype == torch.bool
                else logits + block_mask
            )
            sees_none = logits.amax(dim=-1, keepdim=True) == -torch.inf
            weights = logits.softmax(dim=-1).masked_fill(sees_none, 0.0)
            weights = weights.gather(3, visual_columns.expand(-1, heads, block.shape[1], -1))
            yield block, weights.masked_fill((block < 0)[:, None, :, None], 0.0)
