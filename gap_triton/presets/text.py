"""Similarity to the text: a baseline of GAP (arXiv 2506.21873)."""

from __future__ import annotations

from ..config import GapConfig
from .budget import check_budget


def configure(budget: float | int = 0.25) -> GapConfig:
    """Keep the tokens that are like the mean embedding of the text after the image, as the decoder gets both.

    Args:
        budget: Share or count of tokens kept.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score="text_similarity")
