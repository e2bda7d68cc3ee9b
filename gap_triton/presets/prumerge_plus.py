"""PruMerge+ (Shang et al., arXiv 2403.15388, section 3.3)."""

from __future__ import annotations

from ..config import GapConfig, Score
from .budget import check_budget

SPREAD = 0.75  # three of four


def configure(budget: float | int = 0.25, score: Score = "cls") -> GapConfig:
    """Keep what PruMerge keeps, with tokens spread evenly over the image among those that survive.

    The paper reports about a quarter of the tokens, the default. The released code keeps the outliers, one in r tokens, and
    every (r // 3)-th token in raster order, so about three of the even sample for each outlier (82 outliers and 250 others
    of 576): how many these are is not given beforehand. Here the budget is; three quarters of it are spread evenly, over
    rows and columns alike, and the best of the others take the rest.

    Args:
        budget: Share or count of tokens kept.
        score: ``"received"`` for a vision encoder without CLS token.
    """
    return GapConfig(
        keep=check_budget(budget), layer=-1, score=score, coverage="stride", merge="nearest", spread=SPREAD
    )
