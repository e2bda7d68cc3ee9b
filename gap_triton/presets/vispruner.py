"""VisPruner (Zhang et al., arXiv 2412.01818, section 3)."""

from __future__ import annotations

from ..config import GapConfig, Score
from .budget import check_budget


def configure(budget: float | int = 128, score: Score = "cls") -> GapConfig:
    """Keep a half by the attention of the CLS token, and of the others those without a duplicate.

    Tokens are compared as they enter the projector. The half is the released code's ``important_ratio`` 0.5; as there, the
    others are dealt into two halves, up to eight of the first that are most like one of the second are removed, and so on.
    The code renumbers the survivors; here they keep their ids.

    Args:
        budget: Share or count of tokens kept (published: 32, 64, 128 of 576).
        score: ``"received"`` for a vision encoder without CLS token. Tokens are then compared as they enter the projector
            too, or as the decoder gets them where there is none.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score=score, coverage="distinct")
