"""SCOPE (Deng et al., arXiv 2510.24214, section 3)."""

from __future__ import annotations

from ..config import GapConfig, Score
from .budget import check_budget


def configure(budget: float | int = 64, score: Score = "cls") -> GapConfig:
    """Keep, one after another, the token whose gain in coverage, times the attention of the CLS token, is the largest.

    A token covers another by their cosine, as they enter the projector. The released code takes the score to the power
    ``ALPHA``, which is 1 in its scripts and here. It adds the heads up, here they are averaged, which chooses the same; it
    renumbers the survivors, here they keep their ids.

    Args:
        budget: Share or count of tokens kept (published: 64, 128, 192 of 576; NeXT: 160, 320, 640 of 2,880).
        score: ``"received"`` for a vision encoder without CLS token. Tokens are then compared as they enter the projector
            too, or as the decoder gets them where there is none.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score=score, coverage="coverage_gain")
