"""Attention over what rotary embedding alone makes of it: SparseVLM+'s score."""

from __future__ import annotations

from torch import Tensor

from ..validation import ShapeChecker
from .op import check_corrected, corrected_importance_op

__all__ = ["corrected_importance"]


def corrected_importance(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    cos: Tensor,
    sin: Tensor,
    turns: Tensor,
    heads: int,
    *,
    rows: Tensor | None = None,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention that query rows pay to visual tokens, over what RoPE makes of it, by the heads with most of that.

    Rotary embedding alone lets a row attend more to what is near. SparseVLM+ (arXiv 2410.04417, version 2.0 of its code)
    divides each probability by the scaled product of two vectors of ones, turned as the row and as the visual token are.
    That is added up over the rows. Then the heads rank by their sum over the visual tokens, and the score is the mean over
    the best of them and over the rows. Equal heads go to the lower one, and NaN is more than any number.

    RoPE makes of a 1 the cosine of its channel's angle, minus or plus the sine: (1, 1) becomes (cos - sin, cos + sin).
    Which channels make a pair, and which aren't turned at all, differs between models, and ``turns`` says it.

    Args:
        query: [B, Hq, Q, D] float32, float16, bfloat16 or float64, after the rotary embedding; any strides.
        key: [B, Hkv, S, D], same dtype, see `visual_importance`; any strides.
        visual_index: [B, V] int64, positions of the visual tokens in any order; -1 = filler.
        cos: [B, Q, E] float32, float16, bfloat16 or float64, by which RoPE turns the Q rows; any strides.
        sin: [B, Q, E], same dtype.
        turns: [D] int64, what a 1 in each channel of a head becomes: ``-e`` = ``cos - sin`` of channel ``e - 1``, ``e`` =
            ``cos + sin`` of it, e in 1..E; 0 = 1 as it was. Of Llama, with D = E = 4, it is ``[-1, -2, 3, 4]``.
        heads: How many heads count, 1 to Hq.
        rows: [B, R] int64, the query rows to average; -1 = filler, left out of the mean. Default: the last row.
        attention_mask: [B, S] bool, True = a real token.
        scale: Factor of ``q k^T``; default ``D ** -0.5``. That of the product of ones is ``D ** -0.5`` in any case.

    Returns:
        [B, V] float32 (float64 for float64 queries), computed in float32 (float64). Filler slots, visual tokens that no row
        sees, and samples without a valid row get 0. Where RoPE makes 0 of the attention, the score is infinite.

    Raises:
        ValueError: If an argument has another shape, dtype or device, or ``heads`` is out of range; on the CPU also for a
            position or a turn out of range.
    """
    optional = (rows, attention_mask, scale)
    check_corrected(ShapeChecker(), query, key, visual_index, cos, sin, turns, heads, *optional)
    return corrected_importance_op(query, key, visual_index, cos, sin, turns, heads, *optional)
