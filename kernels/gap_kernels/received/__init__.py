"""How much attention each token of a vision tower receives."""

from __future__ import annotations

from torch import Tensor

from .op import attention_received_op, check_received

__all__ = ["attention_received"]


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Return the attention that each token receives from the others.

    The value is the mean over heads and query rows of ``softmax(scale * q k^T)`` at each key: what rates patches
    in a vision tower without a CLS token. Every query row is a token of the tower, and so is every key. Memory
    beyond the inputs grows with S, not with S x S: the kernels find the log-sum-exp of each row first, then sweep
    over the rows for each tile of keys.

    Args:
        query: [B, H, S, D] float32, float16, bfloat16 or float64, after the rotary embedding if there is one; D in
            1..256; any strides.
        key: [B, Hkv, S, D], same dtype; H is a multiple of Hkv; any strides.
        attention_mask: [B, S] bool, True = a real token, padding anywhere. Padding is left out of the mean as a
            row, and gets 0 as a key.
        cu_seqlens: [N+1] int32, ascending from 0 to S, where each of N packed sequences (images, windows) begins
            and the last one ends. A row sees its own sequence only, and the mean is over the rows of that sequence.
            B must be 1.
        causal: Whether a row sees no key after its own.
        scale: Factor of ``q k^T``; default ``D ** -0.5``.
        lse: [B, H, S] float32, natural log-sum-exp of each row's scaled and masked scores, if the attention has
            returned it: the first of the two sweeps is then left out. Entries of padding are ignored.

    Returns:
        [B, S] float32 (float64 for float64 queries), computed in float32 (float64). It adds up to 1 over the keys
        of a sequence that has a real token.

    Raises:
        ValueError: If an argument has another shape, dtype or device; on the CPU also if ``cu_seqlens`` doesn't
            ascend from 0 to S (elsewhere tokens that are in no sequence get 0).
    """
    check_received(query, key, attention_mask, cu_seqlens, causal, scale, lse)
    return attention_received_op(query, key, attention_mask, cu_seqlens, causal, scale, lse)
