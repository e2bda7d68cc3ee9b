"""What the operators are compared with: the ways in which the same result is computed elsewhere.

Each takes made inputs and returns what the operator of the same test returns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gap_kernels.aggregate.reference import spatial_aggregate as aggregate_reference
from gap_kernels.flash_attention.reference import attention as attention_reference
from gap_kernels.importance.reference import visual_importance as importance_reference
from gap_kernels.prune.reference import gather_rows, surviving_rows
from gap_kernels.received.reference import attention_received as received_reference
from gap_kernels.region.reference import topk_per_region as region_reference
from gap_kernels.select.reference import topk_indices as select_reference
from torch import Tensor

from bench.operators import Call, Result, aggregated
from bench.shapes import ANCHOR_EVERY, Inputs


def topk_and_sort(x: Inputs) -> Result:
    """``torch.topk``, and a sort to put the indices in order. Ties fall as ``torch.topk`` leaves them."""
    return (x.scores.topk(x.keep, dim=-1).indices.sort(dim=-1).values,)


def regions_and_topk(x: Inputs) -> Result:
    """The best patch of each 2 x 2 region of the padded grid, ``torch.topk`` of these, and a sort."""
    side = math.isqrt(x.neighbours.shape[1])
    half = (side + 1) // 2
    grid = x.scores[:, -(side**2) :].unflatten(1, (side, side))
    padded = F.pad(grid, (0, 2 * half - side, 0, 2 * half - side), value=float("-inf"))
    cells = padded.unflatten(2, (half, 2)).unflatten(1, (half, 2)).transpose(2, 3).flatten(3)  # [B, h, w, 4]
    best, cell = cells.max(-1)
    region = torch.arange(half, device=cell.device)
    patch = (2 * region[:, None] + cell // 2) * side + 2 * region + cell % 2
    chosen = best.flatten(1).topk(x.keep, dim=-1).indices
    return (patch.flatten(1).gather(1, chosen).sort(dim=-1).values,)


def eager_weights(x: Inputs, causal: bool) -> Tensor:
    """Attention weights [B, Hq, S, S] of a whole layer in the model's dtype, as eager attention forms them.

    transformers' own eager attention takes the softmax in float32 and so moves more bytes; this is the faster way.
    """
    group = x.query.shape[1] // x.key.shape[1]
    key = x.key.repeat_interleave(group, dim=1) if group > 1 else x.key
    weights = (x.query @ key.transpose(-1, -2)).mul_(x.query.shape[3] ** -0.5)
    if causal:
        weights += causal_mask(weights.shape[-1], weights.dtype, weights.device)
    return weights.softmax(-1)


@functools.lru_cache(maxsize=1)
def causal_mask(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The additive mask [S, S], which a model makes once for all its layers, so not a part of what is timed."""
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)


def fastv_prune(x: Inputs) -> Result:
    """FastV (arXiv 2403.06764): weights of the whole layer, mean over heads, last row, top-k, sort, gather.

    Only what pruning adds to a layer is counted: its product with the values isn't part of it.
    """
    average = eager_weights(x, causal=True).mean(1)  # [B, S, S]
    num_visual = x.visual_index.shape[1]
    scores = average[:, -1, :num_visual]  # visual tokens come first
    chosen = scores.topk(x.keep, dim=-1).indices
    text = torch.arange(num_visual, x.query.shape[2], device=chosen.device).expand(len(chosen), -1)
    index = torch.cat([chosen, text], dim=1).sort(dim=-1).values

    def gather(tensor: Tensor) -> Tensor:
        return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))

    ids = x.position_ids.gather(-1, index.expand(*x.position_ids.shape[:-1], -1))
    return gather(x.hidden_states), gather(x.cos), gather(x.sin), ids, index, scores.float()


def eager_received(x: Inputs) -> Result:
    """Weights of the whole layer, mean over heads and rows."""
    return (eager_weights(x, causal=False).mean((1, 2)).float(),)


def dense_aggregate(x: Inputs) -> Result:
    """All M x N weights in the model's dtype, and two matrix products; what depends on the grid alone isn't timed."""
    features, similarity, side, radius = aggregated(x)
    unit = F.normalize(similarity, dim=-1)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.gather(1, x.anchors[..., None].expand(-1, -1, tensor.shape[2]))

    nearness, own = grid_nearness(side, radius, unit.dtype, unit.device)
    weights = (rows(unit) @ unit.transpose(-1, -2)).relu() * nearness
    weights /= weights.sum(-1, keepdim=True) + 1e-8
    collected = weights.masked_fill(own, 1.0) @ features
    return (torch.where(x.pillars[..., None], rows(features), collected),)


@functools.lru_cache(maxsize=1)
def grid_nearness(
    side: int, radius: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weights by distance between anchors and patches, and which pairs are the same patch, [M, N] each."""
    patch = torch.arange(side**2, device=device)
    anchor = patch[::ANCHOR_EVERY, None]
    distance = torch.hypot((patch // side - anchor // side).float(), (patch % side - anchor % side).float())
    return (1 - distance / radius).clamp(min=0).to(dtype), patch == anchor


def sdpa(x: Inputs) -> Result:
    """PyTorch's attention. It returns neither log-sum-exp nor importance."""
    grouped = x.query.shape[1] != x.key.shape[1]
    return (F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True, enable_gqa=grouped),)


def flash_attention() -> Call | None:
    """The flash-attn package where it is installed, else None."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None

    def call(x: Inputs) -> Result:
        output = flash_attn_func(
            *(tensor.transpose(1, 2) for tensor in (x.query, x.key, x.value)), causal=True
        )
        return (output.transpose(1, 2),)

    return call


def column_means() -> Call | None:
    """The flash-colsum package where it is installed, else None. It adds by float atomics and returns float16."""
    try:
        from flash_colsum import flash_colsum
    except ImportError:
        return None
    return lambda x: (flash_colsum(x.query.contiguous(), x.key.contiguous()).float(),)


def plain_topk(x: Inputs) -> Result:
    """The definition of ``topk_indices``, without the operator around it, for ``torch.compile`` to see through."""
    return (select_reference(x.scores, x.keep, None, x.keep),)


def plain_importance(x: Inputs) -> Result:
    """The definition of ``visual_importance`` for the last row."""
    return (importance_reference(x.query, x.key, x.visual_index, None, None, None, None),)


def plain_importance_text(x: Inputs) -> Result:
    """The definition of ``visual_importance`` for all text rows."""
    return (importance_reference(x.query, x.key, x.visual_index, x.text_rows, None, None, None),)


def plain_prune(x: Inputs) -> Result:
    """The definition of ``prune_tokens``."""
    (scores,) = plain_importance(x)
    index = surviving_rows(scores, x.visual_index, x.keep, None, None, x.query.shape[2], x.length)
    return *gather_rows(x.hidden_states, x.cos, x.sin, x.position_ids, index), index, scores


def plain_attention(x: Inputs) -> Result:
    """The definition of ``attention``, without importance."""
    return attention_reference(x.query, x.key, x.value, True, None, None, None, None)[:2]


def plain_received(x: Inputs) -> Result:
    """The definition of ``attention_received``."""
    return (received_reference(x.query, x.key, None, None, False, None, None),)


def plain_regions(x: Inputs) -> Result:
    """The definition of ``topk_per_region``."""
    scores = x.scores[:, -x.neighbours.shape[1] :]
    return (region_reference(scores, x.neighbours, 1, x.keep, None, x.keep),)


def plain_aggregate(x: Inputs) -> Result:
    """The definition of ``spatial_aggregate``."""
    features, similarity, side, radius = aggregated(x)
    return (aggregate_reference(features, similarity, x.anchors, side, radius, x.pillars, 1.0),)


def compiled(function: Call) -> Call:
    """``function`` under ``torch.compile``, for one shape. What was compiled before is forgotten."""
    torch._dynamo.reset()

    # Fields become arguments, so that guards are on tensors rather than on the object that holds them.
    def call(fields: dict[str, Any]) -> Result:
        return function(Inputs(**fields))

    optimized: Callable[[dict[str, Any]], Result] = torch.compile(call, fullgraph=True, dynamic=False)
    return lambda x: optimized(dict(vars(x)))
