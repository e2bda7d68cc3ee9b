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
    query: Tensor, key: Tensor, of_features: slice, scale: float | None, bounds: Tensor | None
) -> Tensor:
    """Return the attention that each token receives, mean over heads and rows.

    Args:
        query: [B, H, S, D].
        key: [B, Hkv, S, D].
        of_features: The tokens that become features, F of them.
        scale: Factor of the scores, None = ``D ** -0.5``.
        bounds: [N + 1] int32, the cumulative lengths of the sequences that the tokens are; None = one.

    Returns:
        [B * F] float32.
    """
    score = attention_received(query, key, scale=scale, cu_seqlens=bounds)
    return score[:, of_features].flatten().float()


def key_rows(key: Tensor, of_features: slice) -> Tensor:
    """Return the keys [B, Hkv, S, D] of the F tokens ``of_features``, all heads together: [B * F, Hkv * D]."""
    return key[:, :, of_features].transpose(1, 2).flatten(2).flatten(0, 1)
