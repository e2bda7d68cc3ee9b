"""The text that may judge an image: SparseVLM's raters."""

from __future__ import annotations

from torch import Tensor

from ..validation import check_image_and_text
from .op import text_raters_op

__all__ = ["text_raters"]


def text_raters(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> Tensor:
    """Find the rows of text that are relevant to an image: SparseVLM's raters (arXiv 2410.04417, section 3.2).

    For each visual token, the products with all text tokens go through a softmax over the text. The sum of that over the
    visual tokens is a text token's relevance, and raters are the text tokens whose relevance is at least the mean over the
    text. Where none reaches it (by rounding, or because of NaN) all of the text rates.

    Args:
        embeds: [B, Q, C] float32, float16, bfloat16 or float64, what enters the decoder.
        visual_index: [B, V] int64, rows of visual tokens, -1 = filler, anywhere.
        text_rows: [B, R] int64, rows of text, -1 = filler, anywhere.

    Returns:
        [B, Q] bool. No gradient flows back.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated; on the CPU also if a row isn't there.
    """
    check_image_and_text(embeds, visual_index, text_rows)
    return text_raters_op(embeds, visual_index, text_rows)
