"""SwiftVLM (Qian et al., arXiv 2602.03134, section 3), without its bypass."""

from __future__ import annotations

from ..config import GapConfig, Stage
from .budget import check_share, rounded
from .depth import pruning_layers

FIRST_LAYERS = (3, 11, 15)


def configure(budget: float = 0.125, layers: int = 32) -> GapConfig:
    """Keep the same share in three layers that choose well, 3, 11 and 15 of 32, by the last prompt token's attention.

    This is the arm "drop" of the paper's ablation. In the published method tokens that are not chosen bypass the layers up
    to the next choice, where they can be chosen again, moved by what a mean of similar ones has changed meanwhile; here a
    token that is dropped stays dropped, and no mean goes on for it. The layers were found on LLaVA-1.5-7B, and are counted
    from 1 here. The paper states budgets as means over the layers and not how the three stages share them; here each keeps
    the same share of what the one before left. Both keep ids.

    Args:
        budget: Share of tokens left after the last stage. The paper's means of 192 and 128 of 576 are 0.1414 and 0.0448.
        layers: Number of decoder layers; layers 3, 11 and 15 of 32 are scaled to it.
    """
    ratio = check_share(budget) ** (1 / len(FIRST_LAYERS))
    first, *rest = pruning_layers(FIRST_LAYERS, layers)
    later = tuple(Stage(rounded(ratio ** (i + 2)), layer, "last_token") for i, layer in enumerate(rest))
    return GapConfig(keep=rounded(ratio), layer=first, score="last_token", then=later)
