"""HiPrune (Liu et al., arXiv 2508.00553, section 4)."""

from __future__ import annotations

from ..config import GapConfig
from .budget import check_budget


def configure(budget: float | int = 64) -> GapConfig:
    """Keep a few anchors with their neighbours, by a middle layer of the vision encoder, and the best by its last one.

    The score is the attention that a token receives, in both. As in the released code, one anchor comes on 50 tokens kept,
    rounded (4 of 192, 3 of 128, 1 of 64): with the four tokens around it that is about the published tenth. The code takes
    the token before the first of a row for its left neighbour, and so at the other edges; here a token at an edge has
    fewer neighbours. The middle layer is the 9th of CLIP's 24 and the 16th of Qwen2.5-VL's 32. The code renumbers the
    survivors on LLaVA; here they keep their ids.

    Args:
        budget: Share or count of tokens kept (published: 64, 128, 192 of 576; NeXT: 160, 320, 640 of 2,880; on Qwen2.5-VL
            0.112, 0.223, 0.334).
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score="received", coverage="anchors")
