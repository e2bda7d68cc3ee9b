"""How much visual tokens are like the text, by what enters the decoder."""

from __future__ import annotations

from torch import Tensor

from ..validation import check_image_and_text
from .op import text_cosine_op

__all__ = ["text_cosine"]


def text_cosine(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> Tensor:
    """Return the cosine of each visual token to the mean embedding of the text.

    This is TRIM's score (arXiv 2409.10994, section 3) for vision encoders that have no text side.

    Args:
        embeds: [B, Q, C] float32, float16, bfloat16 or float64, what enters the decoder; any strides.
        visual_index: [B, V] int64, rows of visual tokens, -1 = filler, anywhere.
        text_rows: [B, R] int64, rows of text, -1 = filler, anywhere.

    Returns:
        [B, V] float32, computed in that (float64 for float64). 0 at filler, where a vector is 0, and where there is no text.
        NaN among the features of the text spoils its sample. No gradient flows back.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated; on the CPU also if a row isn't there.
    """
    check_image_and_text(embeds, visual_index, text_rows)
    return text_cosine_op(embeds, visual_index, text_rows)
