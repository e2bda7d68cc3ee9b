"""CDPruner (Zhang et al., arXiv 2506.10967, section 3)."""

from __future__ import annotations

from ..config import GapConfig
from .budget import check_budget


def configure(budget: float | int = 64) -> GapConfig:
    """Keep tokens that are unlike each other and concern the text, by greedy MAP of a DPP that is weighted by relevance.

    Cosines are those of the tokens as the decoder gets them, as in the released code. Its relevance is the negated cosine to
    CLIP's text output, averaged over the parts of the text and scaled to 0..1. The checkpoints of vision-language models do
    not hold that encoder, so here it is the cosine to the mean embedding of the text after the image, scaled alike but not
    negated, for among the decoder's embeddings what is alike belongs together. The code chooses in each tile by itself, here
    a prompt's tokens are chosen together; it renumbers the survivors, here they keep their ids.

    Args:
        budget: Share or count of tokens kept (published: 64, 128, 192 of 576; NeXT: 160, 320, 640 of 2,880).
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score="text_similarity", coverage="determinant")
