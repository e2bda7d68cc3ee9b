"""What an attention layer of a vision tower says of the tokens that become features, by its queries and keys."""

from __future__ import annotations

from gap_kernels import attention_received, visual_importance
from torch import Tensor


def cls_scores(query: Tensor, key: Tensor, index: Tensor, row: Tensor, scale: float | None) -> Tensor:
    """Return the attention of the CLS token, mean over heads.

    Args:
        query: [B, H, S, D].
        key: [B, Hkv, S, D].
        index: [B, N] int64, the tokens that become features.
        row: [B, 1] int64, the CLS token.
        scale: Factor of the scores, None = ``D ** -0.5``.

    Returns:
        [B * N] float32.
    """
    return visual_importance(query, key, index, rows=row, scale=scale, causal=False).flatten().float()


def received_scores(
    query: Tensor, key: Tensor, first: int, scale: float | None, bounds: Tensor | None
) -> Tensor:
    """Return the attention that each token receives, mean over heads and rows.

    Args:
        query: [B, H, S, D].
        key: [B, Hkv, S, D].
        first: The first token that becomes a feature.
        scale: Factor of the scores, None = ``D ** -0.5``.
        bounds: [N + 1] int32, the cumulative lengths of the sequences that the tokens are; None = one.

    Returns:
        [B * (S - first)] float32.
    """
    score = attention_received(query, key, scale=scale, cu_seqlens=bounds)
    return score[:, first:].flatten().float()


def key_rows(key: Tensor, first: int) -> Tensor:
    """Return the keys [B, Hkv, S, D] of each token from ``first`` on, all heads together: [B * (S - first), Hkv * D]."""
    return key[:, :, first:].transpose(1, 2).flatten(2).flatten(0, 1)
