"""FastV (Chen et al., arXiv 2403.06764, section 4.1)."""

from __future__ import annotations

from ..config import GapConfig
from .budget import check_budget
from .depth import pruning_layers

FIRST_LAYERS = (2,)


def configure(budget: float | int = 0.5, layers: int = 32) -> GapConfig:
    """Keep the tokens that the last prompt token attends to most, two layers into the decoder (K = 2, R = 50%).

    The released code takes the attention of the layer before layer K, 0-based, and drops on entering layer K; so does
    this. Its in-place variant keeps ids, as this does; it masks tokens and drops nothing.

    Args:
        budget: Share or count of tokens kept.
        layers: Number of decoder layers; K = 2 of 32 is scaled to it.
    """
    (layer,) = pruning_layers(FIRST_LAYERS, layers)
    return GapConfig(keep=check_budget(budget), layer=layer, score="last_token")
