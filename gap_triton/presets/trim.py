"""TRIM (Song et al., arXiv 2409.10994, section 3)."""

from __future__ import annotations

from ..config import GapConfig, Outliers
from .budget import check_budget_or_outliers


def configure(budget: float | int | Outliers = "outliers") -> GapConfig:
    """Keep the tokens that are like the text, and their opposite: one token that is the mean of all others.

    The paper compares with CLIP's text encoder, which the checkpoints of vision-language models do not hold; here
    tokens are compared with the mean embedding of the text after the image, as the decoder gets both. By default the
    number of tokens adapts to the image as in the released code: as many survive as there are outliers in the softmax of the
    similarity (which is negated there, because CLIP's is small at what the text names; paper: about a fifth of the tokens).
    The mean takes the place, and the id, of the best-scored dropped token; the released code puts it last and numbers all
    tokens from 0.

    Args:
        budget: Share or count of tokens kept, the mean included, or ``"outliers"``.
    """
    return GapConfig(
        keep=check_budget_or_outliers(budget), layer=-1, score="text_similarity", merge="average"
    )
