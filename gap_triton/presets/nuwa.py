"""Nüwa (arXiv 2602.02951, section 3)."""

from __future__ import annotations

from fractions import Fraction

from ..config import GapConfig, Score, Stage
from ..plain import plain, shown
from .budget import check_budget, rounded
from .depth import pruning_layers

# First layer with fewer tokens, of 32: 16 on LLaVA; on Qwen2.5-VL 15 of 28.
LLAVA_LAYERS, QWEN_LAYERS = (16,), (Fraction(15 * 32, 28),)
# Of the average budget, what each stage keeps on LLaVA-1.5: 112 and 16 for 64, 224 and 32 for 128, 336 and 48 for 192.
FIRST, SECOND = Fraction(7, 4), Fraction(1, 4)
# On LLaVA-NeXT, by budget: what the first stage keeps of all tiles together, and how many of each region are candidates.
NEXT = {160: (290, 2), 320: (582, 3), 640: (1162, 3)}
NEXT_FIRST, NEXT_SECOND = 1.815, 0.1  # between and beyond these: by average token, and of what is left
# On Qwen2.5-VL, by the average share: what the first stage keeps, and what the second keeps of that.
QWEN = {0.25: (0.35, 0.42), 0.5: (0.60, 0.66), 0.75: (0.85, 0.70)}
QWEN_CANDIDATES = 3  # of each region, also where fewer would do; 4 at 0.75


def configure(
    budget: float | int = 64, layers: int = 32, score: Score = "cls", tiles: bool | None = None
) -> GapConfig:
    """Keep tokens of every region, let them collect what is around, and prune by text half-way through the decoder.

    Stage 1 keeps the best of each region of 2 x 2 patches by the attention of the CLS token and adds to each the
    features of similar patches near by. Stage 2 drops half-way through the decoder, by the attention of the last text
    token. Where paper and released code differ, this follows the code, whose numbers are the paper's: the score is the
    attention alone (paper: times the norm of the key), pillars are found by score (paper: by key norm), stage 2 ranks
    by attention (paper: by cosine to the mean text embedding). LLaVA-NeXT has the 2, 3, 3 candidates per region of its
    own encoder in that code; its second stage is the paper's, for the code's table of it holds LLaVA-1.5 alone.

    On Qwen2.5-VL three things of the code differ. It compares tokens by their mean over blocks 7 to 23 of the tower, each
    put through the merger, in the order of the windows (here: over the last third, in raster order). Stage 2 ranks by the
    mean of the last three rows, by the head with the most (here: the last row, mean over heads). And its masks leave out
    some columns and let layer 14 look ahead, which are faults.

    Args:
        budget: Mean number of tokens over the decoder layers. A count follows the LLaVA settings (published: 64, 128,
            192 of 576; LLaVA-NeXT, without its newline tokens: 160, 320, 640). A share follows those of Qwen2.5-VL
            (published: 0.25, 0.5, 0.75), interpolated.
        layers: Number of decoder layers; layer 16 of 32 (of Qwen2.5-VL: 15 of 28) is scaled to it.
        score: ``"received"`` for a vision encoder without CLS token, as the released code does on Qwen2.5-VL.
        tiles: Whether a count follows the settings of LLaVA-NeXT: as many of each tile, and all newlines besides. None =
            where it is one of those published for it.
    """
    value = check_budget(budget)
    by_tiles = plain(tiles)
    if by_tiles is not None and not isinstance(by_tiles, bool):
        raise ValueError(f"tiles={shown(tiles)}: expected True, False or None")
    if isinstance(value, float):
        first, ratio = _shares(value)
        (layer,) = pruning_layers(QWEN_LAYERS, layers)
        candidates = QWEN_CANDIDATES if first <= QWEN_CANDIDATES / 4 else None
        return _stages(score, first, Stage(ratio, layer, "last_token", share_of="left"), candidates)
    (layer,) = pruning_layers(LLAVA_LAYERS, layers)
    if value in NEXT if by_tiles is None else by_tiles:
        count, candidates = NEXT.get(
            value, (max(round(NEXT_FIRST * value), 1), 2 if value <= min(NEXT) else 3)
        )
        second = Stage(NEXT_SECOND, layer, "last_token", share_of="left")
        return _stages(score, count, second, candidates, by_tiles=True)
    second = Stage(max(round(SECOND * value), 1), layer, "last_token")
    return _stages(score, max(round(FIRST * value), 1), second)


def _stages(
    score: Score,
    first: float | int,
    second: Stage,
    candidates: int | None = None,
    by_tiles: bool = False,
) -> GapConfig:
    return GapConfig(
        keep=first,
        layer=-1,
        score=score,
        coverage="region",
        merge="aggregation",
        per_region=candidates,
        budget_by="tiles" if by_tiles else "tokens",
        then=(second,),
    )


def _shares(budget: float) -> tuple[float, float]:
    """What stage 1 keeps, and stage 2 of that, interpolated between the published ones, and outside by the same lines."""
    points = sorted(QWEN)
    lower = max((point for point in points[:-1] if point <= budget), default=points[0])
    upper = points[points.index(lower) + 1]
    part = (budget - lower) / (upper - lower)
    (low, low_ratio), (high, high_ratio) = QWEN[lower], QWEN[upper]
    first = min(low + part * (high - low), 1.0)
    return rounded(first), rounded(low_ratio + part * (high_ratio - low_ratio))
