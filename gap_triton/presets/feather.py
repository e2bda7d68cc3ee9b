"""FEATHER (Endo et al., arXiv 2412.13180, section 5)."""

from __future__ import annotations

from ..config import GapConfig, Stage
from .budget import LEAST, check_share, rounded
from .depth import pruning_layers

FIRST_LAYERS = (8, 16)
KEEP_SHARE = 0.3  # of the tokens, at each stage: the released script's fastv_ratio=0.7
STRIDE = 3
# The best 30% and a lattice of stride 3 together, where they overlap by chance.
FIRST = 1 / STRIDE**2 + (1 - 1 / STRIDE**2) * KEEP_SHARE


def configure(budget: float = round(FIRST * KEEP_SHARE, 4), layers: int = 32) -> GapConfig:
    """Keep the tokens that the last prompt token attends to when RoPE is left out, and some spread evenly; later fewer.

    RoPE makes tokens near the end of the image look important; without it, an early layer ranks better. The released
    script prunes at layers 8 and 16, 30% survive each time, besides a lattice of stride 3. Here the number of tokens
    is exact: the first stage keeps what those two make together, a fixed part of it spread evenly
    (`gap_triton.strategies.STRIDE_SHARE`), and the second keeps the best 30% of that.

    Args:
        budget: Share of tokens left after the second stage.
        layers: Number of decoder layers; layers 8 and 16 of 32 are scaled to it.
    """
    share = check_share(budget)
    first, second = pruning_layers(FIRST_LAYERS, layers)
    return GapConfig(
        keep=rounded(share / KEEP_SHARE),
        layer=first,
        score="unrotated",
        coverage="stride",
        then=(Stage(max(share, LEAST), second, "unrotated"),),
    )
