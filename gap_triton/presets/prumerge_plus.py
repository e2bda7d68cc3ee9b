"""PruMerge+ (Shang et al., arXiv 2403.15388, section 3.3)."""

from __future__ import annotations

from ..config import GapConfig, Score
from .budget import check_budget


def configure(budget: float | int = 0.25, score: Score = "cls") -> GapConfig:
    """Keep what PruMerge keeps, with tokens spread evenly over the image among those that survive.

    The paper reports about a quarter of the tokens, the default. The released code samples every n-th token with n
    from the number of outliers, so its number of tokens is not given beforehand; here the budget is, and a fixed part
    of it (`gap_triton.strategies.STRIDE_SHARE`) is spread evenly.

    Args:
        budget: Share or count of tokens kept.
        score: ``"received"`` for a vision encoder without CLS token.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score=score, coverage="stride", merge="nearest")
