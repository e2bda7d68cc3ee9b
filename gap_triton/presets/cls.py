"""Attention of the CLS token: a baseline of GAP (arXiv 2506.21873)."""

from __future__ import annotations

from ..config import GapConfig, Score
from .budget import check_budget


def configure(budget: float | int = 0.25, score: Score = "cls") -> GapConfig:
    """Keep the tokens that the vision encoder's CLS token attends to most, in the layer whose output the decoder gets.

    Args:
        budget: Share or count of tokens kept.
        score: ``"received"`` for a vision encoder without CLS token: the attention that each token receives.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score=score)
