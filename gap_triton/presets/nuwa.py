"""Nüwa (arXiv 2602.02951, section 3)."""

from __future__ import annotations

from fractions import Fraction

from ..config import GapConfig, Score, Stage
from .budget import check_budget, rounded
from .depth import pruning_layers

FIRST_LAYERS = (16,)
# Of the average budget, what each stage keeps on LLaVA-1.5: 112 and 16 for 64, 224 and 32 for 128, 336 and 48 for 192.
FIRST, SECOND = Fraction(7, 4), Fraction(1, 4)
# On Qwen2.5-VL, by the average share: what the first stage keeps, and what the second keeps of that.
SHARES = {0.25: (0.35, 0.42), 0.5: (0.60, 0.66), 0.75: (0.85, 0.70)}


def configure(budget: float | int = 64, layers: int = 32, score: Score = "cls") -> GapConfig:
    """Keep tokens of every region, let them collect what is around, and prune by text half-way through the decoder.

    Stage 1 keeps the best of each region of 2 x 2 patches by the attention of the CLS token and adds to each the
    features of similar patches near by. Stage 2 drops on entering layer 16 of 32, by the attention of the last text
    token. Where paper and released code differ, this follows the code, whose numbers are the paper's: the score is the
    attention alone (paper: times the norm of the key), pillars are found by score (paper: by key norm), stage 2 ranks
    by attention (paper: by cosine to the mean text embedding). How many of each region are candidates is not given but
    the least that suffices, which is the code's 1, 2, 3 on 24 x 24 patches. The newline tokens of LLaVA-NeXT all
    survive stage 1 at these budgets and count among its survivors, as they do in the published numbers.

    Args:
        budget: Mean number of tokens over the decoder layers. A count follows the LLaVA settings (published: 64, 128,
            192 of 576; NeXT: 160, 320, 640). A share follows those of Qwen2.5-VL (published: 0.25, 0.5, 0.75),
            interpolated.
        layers: Number of decoder layers; layer 16 of 32 is scaled to it (14 of Qwen2.5-VL's 28).
        score: ``"received"`` for a vision encoder without CLS token, as the released code does on Qwen2.5-VL.
    """
    (layer,) = pruning_layers(FIRST_LAYERS, layers)
    first: float | int
    second: float | int
    value = check_budget(budget)
    if isinstance(value, int):
        first, second = max(round(FIRST * value), 1), max(round(SECOND * value), 1)
    else:
        first, second = _shares(value)
    return GapConfig(
        keep=first,
        layer=-1,
        score=score,
        coverage="region",
        merge="aggregation",
        then=(Stage(second, layer, "last_token"),),
    )


def _shares(budget: float) -> tuple[float, float]:
    """Shares after each stage, interpolated between the published ones, and outside of them by the same lines."""
    points = sorted(SHARES)
    lower = max((point for point in points[:-1] if point <= budget), default=points[0])
    upper = points[points.index(lower) + 1]
    part = (budget - lower) / (upper - lower)
    (low, low_ratio), (high, high_ratio) = SHARES[lower], SHARES[upper]
    first = min(low + part * (high - low), 1.0)
    ratio = min(max(low_ratio + part * (high_ratio - low_ratio), 0.0), 1.0)
    return rounded(first), rounded(first * ratio)
