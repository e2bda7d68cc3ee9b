"""Attention that also returns what pruning needs: the log-sum-exp and the importance of visual tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .op import attention_op, check_attention

__all__ = ["AttentionOutput", "attention"]


class AttentionOutput(NamedTuple):
    """What `attention` returns."""

    output: Tensor
    """[B, Hq, Q, D] in the dtype of ``query``; 0 for a row that sees nothing."""
    lse: Tensor
    """float32 [B, Hq, Q]: natural log-sum-exp of each row's scaled and masked scores; -inf for a row that sees
    nothing. :func:`gap_kernels.visual_importance` and :func:`gap_kernels.prune_tokens` take its entries at their
    rows."""
    importance: Tensor | None
    """float32 [B, V] where ``importance_columns`` is given, else None."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    importance_rows: Tensor | None = None,
    importance_columns: Tensor | None = None,
) -> AttentionOutput:
    """Return ``softmax(scale * q k^T) v``, its log-sum-exp, and if asked the importance of some columns.

    The ``Q`` query rows are the last ``Q`` of the ``S`` key positions. The kernel is FlashAttention's forward pass
    (arXiv 2205.14135, 2307.08691): an online softmax over key tiles, so that no Q x S matrix is ever written.

    The importance is that of `gap_kernels.visual_importance` for ``rows=importance_rows``,
    ``visual_index=importance_columns`` and the same ``causal``. It is a second, small sweep over the R rows and V
    columns once their log-sum-exp is final, not a part of the main loop: a probability is only known at the end of its
    row, so the loop would have to carry R x V values along and rescale them, and every tile would pay for registers
    that few use. The sweep costs two launches over R x V scores, little beside Q x S.

    This is for inference: it has no gradient, and PyTorch raises a RuntimeError in the backward pass.

    Args:
        query: [B, Hq, Q, D] float32, float16, bfloat16 or float64, after the rotary embedding; D in 1..256; any
            strides.
        key: [B, Hkv, S, D], same dtype; Hq is a multiple of Hkv and 1 <= Q <= S; any strides.
        value: Like ``key``.
        causal: True: a row at key column ``c`` sees the columns up to ``c``; False: all of them.
        attention_mask: [B, S] bool, True = a real token, padding anywhere. Hidden keys and values are never used,
            not even if they are NaN.
        scale: Factor of ``q k^T``; default ``D ** -0.5``.
        importance_rows: [B, R] int64, positions within the Q rows to average; -1 = filler, left out of the mean.
            Default: the last row. Needs ``importance_columns``.
        importance_columns: [B, V] int64, positions within the Q rows, in any order; -1 = filler, which gets 0.

    Returns:
        The output, log-sum-exp and importance, computed in float32. For float64 queries all is float64.

    Raises:
        ValueError: If an argument has another shape, dtype or device, or doesn't go with the others; on the CPU
            also for a position out of range.
    """
    check_attention(query, key, value, causal, attention_mask, scale, importance_rows, importance_columns)
    output, lse, importance = attention_op(
        query, key, value, causal, attention_mask, scale, importance_rows, importance_columns
    )
    return AttentionOutput(output, lse, None if importance_columns is None else importance)
