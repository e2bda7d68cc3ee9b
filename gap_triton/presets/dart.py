"""DART (Wen et al., arXiv 2502.11494, section 3)."""

from __future__ import annotations

from ..config import GapConfig
from .budget import check_budget
from .depth import pruning_layers

FIRST_LAYERS = (2,)


def configure(budget: float | int = 128, layers: int = 32) -> GapConfig:
    """Keep four pivots, those with the largest keys, and the tokens least like each of them, two layers into the decoder.

    The released code has four pivots in the image and four in the text, each with an eighth of the budget, rounded down, so
    that 132 tokens are left for 128; here the four in the image have a quarter of the rest each, and the number is exact.
    It sums the keys' absolute values, here pivots are found by their L2 norm. It compares hidden states behind the decoder's
    last norm, here they are compared as they leave the layer. It keeps the survivors' ids, and so does this.

    Args:
        budget: Share or count of tokens kept (published: 64, 128, 192 of 576).
        layers: Number of decoder layers; layer 2 of 32 is scaled to it.
    """
    (layer,) = pruning_layers(FIRST_LAYERS, layers)
    return GapConfig(keep=check_budget(budget), layer=layer, score="key_norm", coverage="least_similar")
