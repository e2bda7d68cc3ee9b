"""PruMerge (Shang et al., arXiv 2403.15388, section 3)."""

from __future__ import annotations

from ..config import GapConfig, Outliers, Score
from .budget import check_budget_or_outliers


def configure(budget: float | int | Outliers = "outliers", score: Score = "cls") -> GapConfig:
    """Keep the tokens that the CLS token attends to most, and merge the others into those whose keys are like theirs.

    As in the paper and the released code, by default the number of tokens adapts to the image: those whose attention
    is an outlier survive. The released code takes the attention of the encoder's last layer, all heads as one; here it is
    that of the layer whose output the decoder gets, mean over heads. There survivors come out in score order and are
    numbered from 0; here they stay in raster order with their own ids. The released code appends one token, the sum of all
    that was dropped; it has no place in the image, so here it takes the place, and the id, of the best-scored dropped
    token.

    Args:
        budget: Share or count of tokens kept, or ``"outliers"``.
        score: ``"received"`` for a vision encoder without CLS token.
    """
    return GapConfig(keep=check_budget_or_outliers(budget), layer=-1, score=score, merge="nearest")
