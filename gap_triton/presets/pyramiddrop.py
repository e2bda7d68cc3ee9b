"""PyramidDrop (Xing et al., arXiv 2410.17247, section 3.2)."""

from __future__ import annotations

from ..config import GapConfig, Stage
from .budget import check_share, rounded
from .depth import pruning_layers

FIRST_LAYERS = (8, 16, 24)


def configure(budget: float = 0.125, layers: int = 32) -> GapConfig:
    """Keep the same share at a quarter, a half and three quarters of the decoder, by the last prompt token's attention.

    The published schedule halves, which leaves an eighth: the default. The released code ranks on entering a layer
    with that layer's projections; here the attention of the layer before is used, because it has been computed anyway.
    It renumbers the survivors; here they keep their ids.

    Args:
        budget: Share of tokens left after the last stage.
        layers: Number of decoder layers; layers 8, 16 and 24 of 32 are scaled to it.
    """
    ratio = check_share(budget) ** (1 / len(FIRST_LAYERS))
    first, *rest = pruning_layers(FIRST_LAYERS, layers)
    later = tuple(Stage(rounded(ratio ** (i + 2)), layer, "last_token") for i, layer in enumerate(rest))
    return GapConfig(keep=rounded(ratio), layer=first, score="last_token", then=later)
