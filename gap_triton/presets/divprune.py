"""DivPrune (Alvar et al., arXiv 2503.02175, section 3)."""

from __future__ import annotations

from ..config import GapConfig
from .budget import check_budget


def configure(budget: float | int = 0.098) -> GapConfig:
    """Keep tokens as far from each other as can be (the max-min diversity problem), by cosines as the decoder gets them.

    The first is, as in the released code, the token farthest from its nearest other. The code rounds the number of tokens to
    the nearest (56 of 576), here it is rounded up (57); it renumbers the survivors, here they keep their ids. As there, all
    tokens of a prompt are compared at once, tiles and newlines included. Nothing is scored, so the score is ``"random"``.

    Args:
        budget: Share or count of tokens kept (published: 0.098 and others).
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score="random", coverage="max_min")
