"""Any tokens: a baseline of GAP (arXiv 2506.21873)."""

from __future__ import annotations

from ..config import GapConfig
from .budget import check_budget


def configure(budget: float | int = 0.25, seed: int = 0) -> GapConfig:
    """Keep tokens drawn at random before the decoder. Runs on every model.

    Args:
        budget: Share or count of tokens kept.
        seed: Of the draw.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score="random", seed=seed)
