"""How visual and text tokens relate by their embeddings alone, without attention."""

from __future__ import annotations

import torch
from gap_kernels.cosine.reference import cosine_to_sum
from gap_kernels.precision import without_autocast
from gap_kernels.raters import reference
from gap_kernels.validation import FLOAT_DTYPES, ShapeChecker
from torch import Tensor


@without_autocast
def text_similarity(visual: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """Return the cosine of each visual token to the mean text embedding.

    This is TRIM's score (arXiv 2409.10994) for towers that have no text side: TRIM takes the projected output of CLIP's
    text encoder instead of a mean. Its released code ranks by the negative of the unnormalised product with that; here a
    larger cosine is a better score, as in the paper.

    Args:
        visual: [G, N, C] float32, float16, bfloat16 or float64.
        text: [G, T, C], any of those dtypes.
        text_mask: [G, T] bool, True = a real token. What is masked is never used, not even if it is NaN. None: all are real.

    Returns:
        [G, N] float32. Without text, all are 0.

    Raises:
        ValueError: If an argument has another shape, dtype or device.
    """
    shapes = ShapeChecker()
    shapes.check("visual", visual, "G N C", FLOAT_DTYPES)
    shapes.check("text", text, "G T C", FLOAT_DTYPES)
    if text_mask is not None:
        shapes.check("text_mask", text_mask, "G T", (torch.bool,))
        text = torch.where(text_mask[..., None], text, 0)
    return cosine_to_sum(visual, text)


@without_autocast
def raters(visual: Tensor, visual_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """Choose the text tokens that may judge the image: SparseVLM's raters (arXiv 2410.04417).

    For each visual token, the products with all text tokens go through a softmax over the text. The mean of that over the
    visual tokens is a text token's relevance, and raters are the text tokens whose relevance is at least the mean over the
    text. The released code takes those above the mean, which may be none; the products are not scaled, in paper and code.

    Args:
        visual: [B, V, C] float32, float16, bfloat16 or float64: hidden states that enter the decoder.
        visual_mask: [B, V] bool, True = a real token.
        text: [B, T, C], any of those dtypes.
        text_mask: [B, T] bool, True = a real token. What is masked is never used, not even if it is NaN.

    Returns:
        [B, T] bool. Where there is text, at least one token is a rater: all of them where none reaches the mean by rounding,
        where NaN hides it, or where there is no visual token.

    Raises:
        ValueError: If an argument has another shape, dtype or device.
    """
    shapes = ShapeChecker()
    shapes.check("visual", visual, "B V C", FLOAT_DTYPES)
    shapes.check("visual_mask", visual_mask, "B V", (torch.bool,))
    shapes.check("text", text, "B T C", FLOAT_DTYPES)
    shapes.check("text_mask", text_mask, "B T", (torch.bool,))
    return reference.raters(visual, visual_mask, text, text_mask)
