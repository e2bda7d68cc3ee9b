"""VScan (Zhang et al., arXiv 2505.22654, section 4)."""

from __future__ import annotations

from itertools import pairwise

from ..config import GapConfig, Score, Stage
from .budget import check_budget, rounded
from .depth import pruning_layers

FIRST_LAYERS = (16,)
# By the mean over the layers, how much more than that the first stage keeps: 96 for 64 on LLaVA-1.5, and on Qwen2.5-VL
# 0.167 for 0.111 and 0.6 for 0.5. With everything kept it is nothing more.
FACTORS = ((1 / 9, 1.5), (0.5, 1.2), (1.0, 1.0))


def configure(budget: float | int = 64, layers: int = 32, score: Score = "cls") -> GapConfig:
    """Keep tokens of all parts of the image and the best, merge the others into them, and prune by text half-way.

    Stage 1 keeps a half by the attention of the CLS token in an early layer of the vision encoder, the best of each of 4 x 4
    windows, and a half by that in the last; each other token goes into the kept one that is most like it. Stage 2 drops on
    entering layer 16 of 32, by the attention of the last prompt token. The early layer is the 6th of CLIP's 24 and the 8th
    of Qwen2.5-VL's 32, as in the released code; its windows are of 6 x 6 tokens on LLaVA's 24 x 24, as here, and of 4 x 4
    on Qwen2.5-VL. It ranks with the projections of the layer that is entered; here the attention of the layer before is
    used, because it has been computed anyway.

    Args:
        budget: Mean number of tokens over the decoder layers. A count is shared as the released example does (published: 96,
            then 32, for 64 of 576). A share is interpolated between those of Qwen2.5-VL (published: 0.111, 0.5).
        layers: Number of decoder layers; layer 16 of 32 is scaled to it (14 of Qwen2.5-VL's 28).
        score: ``"received"`` for a vision encoder without CLS token, as the released code does on Qwen2.5-VL.
    """
    (layer,) = pruning_layers(FIRST_LAYERS, layers)
    value = check_budget(budget)
    first: float | int
    second: float | int
    if isinstance(value, int):
        first, second = max(3 * value // 2, 1), max(value // 2, 1)
    else:
        first = rounded(_factor(value) * value)
        second = rounded(2 * value - first)
    return GapConfig(
        keep=first,
        layer=-1,
        score=score,
        coverage="windows",
        merge="cluster",
        then=(Stage(second, layer, "last_token"),),
    )


def _factor(budget: float) -> float:
    """How much more than ``budget`` the first stage keeps, interpolated; below the least that is published, as there."""
    if budget <= FACTORS[0][0]:
        return FACTORS[0][1]
    (low, more), (high, less) = next(pair for pair in pairwise(FACTORS) if budget <= pair[1][0])
    return more + (budget - low) / (high - low) * (less - more)
