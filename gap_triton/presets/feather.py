"""FEATHER (Endo et al., arXiv 2412.13180, sections 4.2 and 4.3)."""

from __future__ import annotations

from ..config import GapConfig, Stage
from .budget import LEAST, check_share, rounded
from .depth import pruning_layers

FIRST_LAYERS = (8, 16)
LATTICE = 1 / 3**2  # of stride 3
HALVINGS = 60


def configure(budget: float = 0.034, layers: int = 32) -> GapConfig:
    """Keep the tokens that the last prompt token attends to when RoPE is left out, and some spread evenly; later fewer.

    RoPE makes tokens near the end of the image look important; without it, an early layer ranks better. The released
    script prunes at layers 8 and 16. The first stage keeps the best R = 30% and a lattice of stride 3, the second R^2 of
    what is left: of 576 tokens 218, of which 64 are the lattice's, and 19. Here the number of tokens of the first stage is
    exact: it keeps what the two make together where they overlap by chance, and the beginning of an even spread takes the
    place of the lattice. Attention is taken over the visual tokens alone, as in the released code, which keeps ids, as
    this does.

    Args:
        budget: Share of tokens left after the second stage; R follows from it. The default is that of R = 30%.
        layers: Number of decoder layers; layers 8 and 16 of 32 are scaled to it.
    """
    ratio = _ratio(check_share(budget))
    first, second = pruning_layers(FIRST_LAYERS, layers)
    kept = _together(ratio)
    return GapConfig(
        keep=rounded(kept),
        layer=first,
        score="unrotated",
        coverage="stride",
        spread=rounded(LATTICE / kept),
        then=(Stage(max(rounded(ratio**2), LEAST), second, "unrotated", share_of="left"),),
    )


def _together(ratio: float) -> float:
    """The best ``ratio`` and the lattice together, where they overlap by chance."""
    return LATTICE + (1 - LATTICE) * ratio


def _ratio(budget: float) -> float:
    """R such that ``budget`` of the tokens are left after both stages."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _together(middle) * middle**2 >= budget else (middle, high)
    return high
