"""Queries and keys as they are before rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, ShapeChecker, check_heads, describe
from .op import unrotate_op

__all__ = ["unrotate"]


def unrotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, pairs: Tensor, *, rescale: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys back: undo their rotary embedding (RoPE, arXiv 2104.09864).

    RoPE turns pairs of channels. Of a pair the first becomes ``x cos - y sin``, the second ``y cos + x sin``; ``pairs`` says
    which channels these are, and which cos and sin they take: halves, neighbours, only some of the channels, or several
    axes of positions, each for some of them (M-RoPE).

    Args:
        query: [B, Hq, S, D] float32, float16, bfloat16 or float64, after RoPE; any strides.
        key: [B, Hkv, S, D] in that dtype; any strides.
        cos: [B, S, F], or [A, B, S, F] for A axes; any of those dtypes and strides. B may be 1 for all samples.
        sin: The same.
        pairs: [2, D] int32. By channel, the other one of its pair, which is the first of it where it is the lower one; and
            the column of ``cos`` and ``sin`` that it takes, those of all axes counted one after the other, or -1: it is not
            turned.
        rescale: Whether ``cos`` and ``sin`` have another length than 1, as YaRN gives them, which is taken back, too.

    Returns:
        Query and key before RoPE, in their dtype, each computed in float32 (float64 for float64). No gradient flows back.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated; on the CPU also if ``pairs`` names what
            isn't there (elsewhere such a channel is not turned).
    """
    shapes = ShapeChecker()
    shapes.check("query", query, "B Hq S D", FLOAT_DTYPES)
    shapes.check("key", key, "B Hkv S D", (query.dtype,))
    check_heads(query, key)
    dims = "A B|1 S F" if isinstance(cos, Tensor) and cos.dim() == 4 else "B|1 S F"
    shapes.check("cos", cos, dims, FLOAT_DTYPES)
    if cos.shape[-3] not in (1, query.shape[0]):
        raise ValueError(f"cos: expected {query.shape[0]} samples or 1, got {describe(cos)}")
    shapes.check("sin", sin, dims, (cos.dtype,))
    shapes.sizes["2"] = 2
    shapes.check("pairs", pairs, "2 D", (torch.int32,))
    if not isinstance(rescale, bool):
        raise ValueError(f"rescale: expected a bool, got {describe(rescale)}")
    return unrotate_op(query, key, cos, sin, pairs, rescale)
