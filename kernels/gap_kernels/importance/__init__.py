"""How much the prompt attends to each visual token."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..validation import ShapeChecker
from .op import check_importance, visual_importance_op

__all__ = ["visual_importance"]


def visual_importance(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    *,
    rows: Tensor | None = None,
    attention_mask: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    value: Tensor | None = None,
    head_reduction: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Return the attention that chosen query rows pay to each visual token.

    The value is the mean over heads and query rows of ``softmax(scale * q k^T)`` at the visual keys. With the
    last row alone it is the score in the released code of FastV (arXiv 2403.06764); with the text rows it is
    text-to-visual attention.

    The ``Q`` query rows are the last ``Q`` of the ``S`` key positions. A position in ``rows`` or
    ``visual_index`` counts within those rows: position ``p`` is key column ``p + S - Q``. A row at key column
    ``c`` sees the columns up to ``c`` that ``attention_mask`` allows; with ``causal=False`` any row sees every
    column that the mask allows.

    Variants that the field uses:

    - CLS attention in a vision tower: ``causal=False`` and the CLS token's position as the only row.
    - Value-norm weighting: ``value`` multiplies each probability by the L1 norm of the key's value vector, as
      VATP does (arXiv 2406.12335).
    - The strongest head: ``head_reduction="max"``.
    - Without RoPE, as in FEATHER (arXiv 2412.13180): pass ``query`` and ``key`` from before the rotary embedding,
      the key of every one of the S columns, and no ``lse``, as that of the attention belongs to rotated scores.

    Args:
        query: [B, Hq, Q, D] float32, float16, bfloat16 or float64, after the rotary embedding (or before, see
            above); any strides.
        key: [B, Hkv, S, D], same dtype; Hq is a multiple of Hkv and Q <= S; any strides.
        visual_index: [B, V] int64, positions of the visual tokens in any order; -1 = filler.
        rows: [B, R] int64, the query rows to average; -1 = filler, left out of the mean. Default: the last
            row (with padding on the right, name the last real row of each sample).
        attention_mask: [B, S] bool, True = a real token.
        lse: [B, Hq, R] float32, natural log-sum-exp of each row's scaled and masked scores, if the attention
            has returned it: only the visual keys are then read. Entries of filler rows are ignored.
        scale: Factor of ``q k^T``; default ``D ** -0.5``.
        causal: True: a row sees no key after its own; False: every row sees all columns that ``attention_mask``
            allows. A given ``lse`` must be that of the same rule.
        value: [B, Hkv, S, Dv], same dtype as ``key``, any Dv and strides: the value vectors whose L1 norms, each in
            its own key head, weight the probabilities. The scores of a row then no longer add up to at most 1.
            None: no weighting. Values of other keys, and of those that the mask hides, are never used.
        head_reduction: What becomes of each head's mean over rows: "mean" or "max" over the Hq query heads. NaN in
            one head is NaN in both.

    Returns:
        [B, V] float32 (float64 for float64 queries), computed in float32 (float64). Filler slots, visual
        tokens that no row sees, and samples without a valid row get 0; a row that sees nothing adds 0 but
        counts in the mean over rows.

    Raises:
        ValueError: If an argument has another shape, dtype or device; on the CPU also for a position out of
            range.
    """
    optional = (rows, attention_mask, lse, scale, causal, value, head_reduction)
    check_importance(ShapeChecker(), query, key, visual_index, *optional)
    return visual_importance_op(query, key, visual_index, *optional)
