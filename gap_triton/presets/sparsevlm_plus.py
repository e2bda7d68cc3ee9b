"""SparseVLM+ (Zhang et al., arXiv 2410.04417, version 2.0 of its code)."""

from __future__ import annotations

from ..config import GapConfig
from .sparsevlm import schedule

# Tokens left after each stage by budget, of 576: the released code's lists with USE_VERSION=2_0.
PUBLISHED = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


def configure(budget: float | int = 192, layers: int = 32) -> GapConfig:
    """Keep the tokens that the text rows relevant to the image attend to more than RoPE accounts for, in three stages.

    As in the released code, attention is divided by what RoPE makes of equal queries and keys at the same distance, and
    only the heads count that have the most of it, 14 of 32. It keeps the ids of the survivors, as this does, and recycles
    nothing.

    Args:
        budget: 192, 128, 96 or 64, the released code's budgets for 576 tokens, each roughly the mean over the layers; or a
            share. For a share, the published lists are interpolated as shares of 576.
        layers: Number of decoder layers; layers 2, 6 and 15 of 32 are scaled to it.
    """
    return schedule(budget, layers, PUBLISHED, "raters_corrected")
