"""VisionZip (Yang et al., arXiv 2412.04467, section 3)."""

from __future__ import annotations

from ..config import GapConfig, Score
from .budget import check_budget


def configure(budget: float | int = 64, score: Score = "cls") -> GapConfig:
    """Keep the dominant tokens, by the attention of the CLS token, and merge the others into a few contextual ones.

    The released code also keeps the CLS token itself; it has no place in the image, and is left out here. It puts
    contextual tokens after the dominant ones and numbers all of them from 0; here every one keeps the place and the
    id of the token that the others were merged into. It compares tokens by keys that are averaged over the heads; here by
    all heads of a key, one after the other, so that contextual tokens are made of other members.

    Args:
        budget: Share or count of tokens kept, contextual ones included (published: 64, 128, 192 of 576).
        score: ``"received"`` for a vision encoder without CLS token.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score=score, merge="contextual")
