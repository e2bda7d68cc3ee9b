"""FasterVLM (Zhang et al., arXiv 2412.01818, first version, section 3)."""

from __future__ import annotations

from ..config import GapConfig, Score
from .budget import check_budget


def configure(budget: float | int = 0.1, score: Score = "cls") -> GapConfig:
    """Keep the tokens that the vision encoder's CLS token attends to most: GAP's baseline `cls`, published on its own.

    The released code renumbers the survivors; here they keep their ids. The second version of the paper is VisPruner.

    Args:
        budget: Share or count of tokens kept (published: 0.5, 0.25, 0.1 and 0.05, which are 288, 144, 58 and 29 of 576).
        score: ``"received"`` for a vision encoder without CLS token.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score=score)
