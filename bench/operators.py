"""Every public operator as one call on made inputs: the list that timings and checks go through."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import gap_kernels
import torch
from gap_kernels.prune.coverage import Coverage
from torch import Tensor

from bench.shapes import Inputs

Result = tuple[Tensor, ...]
Call = Callable[[Inputs], Result]

GREEDY_STEPS = 16
FEW_PATCHES = 64
RADIUS_OF_SIDE = 0.7
"""Within which patches are collected, nearly as Nüwa has it: sqrt(280) on 24 x 24."""


def read_prompt(x: Inputs) -> Result:
    """Find the visual and the text rows, and count them."""
    rows = gap_kernels.read_prompt(x.visual)
    return rows.visual_index, rows.text_rows, rows.last_row, rows.counts


def text_raters(x: Inputs) -> Result:
    """Find the text that may judge the image."""
    # Products of about 1, by a power of two, which every dtype scales by exactly: larger ones give each visual token to one
    # word alone, and then whole numbers are compared with their mean, where rounding decides.
    scale = 2.0 ** -round(math.log2(x.hidden_states.shape[2]) / 4)
    return (gap_kernels.text_raters(x.hidden_states * scale, x.visual_index, x.text_rows).long(),)


def text_cosine(x: Inputs) -> Result:
    """Compare the image with the text."""
    return (gap_kernels.text_cosine(x.hidden_states, x.visual_index, x.text_rows),)


def topk_indices(x: Inputs) -> Result:
    """Select from given scores."""
    return (gap_kernels.topk_indices(x.scores, x.keep),)


def visual_importance(x: Inputs) -> Result:
    """Score by the last row."""
    return (gap_kernels.visual_importance(x.query, x.key, x.visual_index),)


def visual_importance_text(x: Inputs) -> Result:
    """Score by all text rows."""
    return (gap_kernels.visual_importance(x.query, x.key, x.visual_index, rows=x.text_rows),)


def visual_importance_lse(x: Inputs) -> Result:
    """Score by the last row, its log-sum-exp given."""
    return (gap_kernels.visual_importance(x.query, x.key, x.visual_index, lse=x.lse),)


def corrected_importance(x: Inputs) -> Result:
    """Score by all text rows, over what RoPE makes of it; of all heads, as rounding may decide which are the best."""
    # Made of positive numbers what is divided by is far from 0.
    head_dim, device = x.cos.shape[2], x.cos.device
    turns = torch.arange(1, head_dim + 1, device=device)
    angles = (x.cos.abs(), x.sin.abs(), turns)
    heads = x.query.shape[1]
    return (
        gap_kernels.corrected_importance(x.query, x.key, x.visual_index, *angles, heads, rows=x.text_rows),
    )


def _rows(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return x.hidden_states, x.cos, x.sin, x.position_ids, x.visual_index


def prune_by_score(x: Inputs) -> Result:
    """Prune by given scores, which come back as they are and so are no part of the result."""
    return tuple(gap_kernels.prune_by_score(x.scores, *_rows(x), x.keep, length=x.length))[:5]


def spread_of(x: Inputs, coverage: Coverage) -> dict[str, Any]:
    """Return what a coverage needs: the regions of the patches, which are the last visual tokens; an order from the end."""
    if coverage == "region":
        before = x.visual_index.shape[1] - x.neighbours.shape[1]
        neighbours = torch.where(x.neighbours < 0, -1, x.neighbours + before)
        return {"neighbours": torch.nn.functional.pad(neighbours, (0, 0, before, 0), value=-1)}
    return {"order": x.visual_index.flip(1).contiguous()} if coverage == "stride" else {}


def prune_tokens(x: Inputs, coverage: Coverage = "topk") -> Result:
    """Score by the last row and prune."""
    spread = spread_of(x, coverage)
    return tuple(
        gap_kernels.prune_tokens(
            x.query, x.key, *_rows(x), x.keep, length=x.length, coverage=coverage, **spread
        )
    )


def prune_tokens_text(x: Inputs) -> Result:
    """Score by all text rows and prune."""
    pruned = gap_kernels.prune_tokens(x.query, x.key, *_rows(x), x.keep, rows=x.text_rows, length=x.length)
    return tuple(pruned)


def prune_tokens_lse(x: Inputs) -> Result:
    """Score by the last row, its log-sum-exp given, and prune."""
    return tuple(gap_kernels.prune_tokens(x.query, x.key, *_rows(x), x.keep, lse=x.lse, length=x.length))


def unrotate(x: Inputs) -> Result:
    """Turn queries and keys back, of halves."""
    head_dim = x.cos.shape[-1]
    channel = torch.arange(head_dim, dtype=torch.int32, device=x.cos.device)
    pairs = torch.stack([(channel + head_dim // 2) % head_dim, channel])
    return gap_kernels.unrotate(x.query, x.key, x.cos, x.sin, pairs)


def scatter_rows(x: Inputs) -> Result:
    """Put the visual rows back to where they stand, in the reverse of their order, among all rows."""
    rows = x.hidden_states[:, : x.visual_index.shape[1]]
    num_rows = x.hidden_states.shape[1]
    return (gap_kernels.scatter_rows(rows, x.visual_index.flip(1), num_rows, base=x.hidden_states),)


def attention(x: Inputs) -> Result:
    """Causal attention and its log-sum-exp."""
    output, lse, _ = gap_kernels.attention(x.query, x.key, x.value)
    return output, lse


def attention_importance(x: Inputs) -> Result:
    """Causal attention that also scores visual tokens by all text rows."""
    output, lse, importance = gap_kernels.attention(
        x.query, x.key, x.value, importance_rows=x.text_rows, importance_columns=x.visual_index
    )
    assert importance is not None
    return output, lse, importance


def attention_received(x: Inputs) -> Result:
    """Attention that each token of a vision tower receives."""
    return (gap_kernels.attention_received(x.query, x.key),)


def topk_per_region(x: Inputs) -> Result:
    """Select among the best patches of 2 x 2 regions."""
    scores = x.scores[:, -x.neighbours.shape[1] :]
    return (gap_kernels.topk_per_region(scores, x.neighbours, 1, x.keep),)


def window_ranks(x: Inputs) -> Result:
    """Rank patches, half of what is kept from all windows; as whole numbers, since infinity has no rounding."""
    scores = x.scores[:, -x.neighbours.shape[1] :]
    side = math.isqrt(scores.shape[1])
    ranks = gap_kernels.window_ranks(scores, scores.flip(1), (side, side), x.keep // 2)
    return (ranks.view(torch.int32).long(),)


def greedy_indices(x: Inputs, rule: Literal["max_min", "determinant", "coverage_gain"]) -> Result:
    """Choose a few patches one after another; of many, two choices come to be as near as their rounding."""
    features = aggregated(x)[0]
    return (gap_kernels.greedy_indices(features, min(x.keep, GREEDY_STEPS), rule),)


def distinct_indices(x: Inputs) -> Result:
    """Remove duplicates among a few patches; of many, two come to be as alike as their rounding."""
    features = aggregated(x)[0][:, :FEW_PATCHES]
    patches = features.shape[1]
    scores = x.scores[:, :patches].contiguous()
    return (gap_kernels.distinct_indices(features, scores, patches // 2, patches // 4),)


def least_similar_indices(x: Inputs) -> Result:
    """Choose among a few patches what is least like one of two of them."""
    features = aggregated(x)[0][:, :FEW_PATCHES]
    pivots = torch.arange(2, device=features.device).expand(len(features), -1)
    return (gap_kernels.least_similar_indices(features, pivots, features.shape[1] // 2),)


def aggregated(x: Inputs) -> tuple[Tensor, Tensor, int, float]:
    """Features of the patches, by rows, what they are compared by, the side of their square and the radius."""
    patches = x.neighbours.shape[1]
    side = math.isqrt(patches)
    features, similarity = (heads.transpose(1, 2).flatten(2)[:, -patches:] for heads in (x.query, x.key))
    return features, similarity, side, RADIUS_OF_SIDE * side


def spatial_aggregate(x: Inputs) -> Result:
    """One patch in five collects, but for every other one of them, a pillar."""
    features, similarity, side, radius = aggregated(x)
    return (
        gap_kernels.spatial_aggregate(
            features, similarity, x.anchors, (side, side), radius=radius, pillars=x.pillars
        ),
    )


def collect_nearest(x: Inputs) -> Result:
    """One patch in five collects all others: which are the nearest few could be decided by rounding."""
    features, similarity, _, _ = aggregated(x)
    patches = features.shape[1]
    scores = x.scores[:, -patches:].contiguous()
    return (gap_kernels.collect_nearest(features, similarity, scores, x.anchors, patches),)


def merge_nearest(x: Inputs) -> Result:
    """Every patch has the key of one of the first few, which it goes to: rounding decides nothing."""
    features, similarity, _, _ = aggregated(x)
    count = x.anchors.shape[1]
    patch = torch.arange(features.shape[1], device=features.device)
    targets = patch[:count].expand(len(features), -1)
    return (gap_kernels.merge_nearest(features, similarity[:, patch % count], targets),)


DECODER_CALLS: dict[str, Call] = {
    "read_prompt": read_prompt,
    "text_raters": text_raters,
    "text_cosine": text_cosine,
    "topk_indices": topk_indices,
    "visual_importance": visual_importance,
    "visual_importance, text rows": visual_importance_text,
    "visual_importance, lse": visual_importance_lse,
    "corrected_importance": corrected_importance,
    "prune_by_score": prune_by_score,
    "prune_tokens": prune_tokens,
    "prune_tokens, text rows": prune_tokens_text,
    "prune_tokens, lse": prune_tokens_lse,
    "prune_tokens, region": partial(prune_tokens, coverage="region"),
    "prune_tokens, stride": partial(prune_tokens, coverage="stride"),
    "scatter_rows": scatter_rows,
    "unrotate": unrotate,
    "attention": attention,
    "attention, importance": attention_importance,
}
TOWER_CALLS: dict[str, Call] = {
    "attention_received": attention_received,
    "topk_per_region": topk_per_region,
    "window_ranks": window_ranks,
    "spatial_aggregate": spatial_aggregate,
    "collect_nearest": collect_nearest,
    "merge_nearest": merge_nearest,
    "distinct_indices": distinct_indices,
    "least_similar_indices": least_similar_indices,
    "greedy_indices, max-min": partial(greedy_indices, rule="max_min"),
    "greedy_indices, determinant": partial(greedy_indices, rule="determinant"),
    "greedy_indices, coverage": partial(greedy_indices, rule="coverage_gain"),
}
