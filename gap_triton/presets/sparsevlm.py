"""SparseVLM (Zhang et al., arXiv 2410.04417, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import GapConfig, Score, Stage
from ..plain import is_int, plain, shown
from .budget import check_share, rounded
from .depth import pruning_layers

# Layers 2, 6 and 15 of 32 score, and the next ones are the first with fewer tokens.
FIRST_LAYERS = (3, 7, 16)
# Tokens left after each stage by budget, of 576: the released code's lists.
PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
TOKENS = 576

Lists = Mapping[int, tuple[int, int, int]]


def configure(budget: float | int = 192, layers: int = 32) -> GapConfig:
    """Keep the tokens that the text rows relevant to the image attend to, in three stages.

    Which rows those are, the raters, is found once from the embeddings, as in paper and code. The paper adapts the
    number of tokens to the rank of the attention; the released code has fixed lists, which this follows. It also
    recycles a part of the dropped tokens as cluster means after the others; these have no place in the image and are
    left out here. Its versions 1.x renumber the survivors; here they keep their ids. Version 2.0 is the preset
    ``"sparsevlm+"``.

    Args:
        budget: 192, 128, 96 or 64, the released code's budgets for 576 tokens, each roughly the mean over the layers; or a
            share. For a share, the published lists are interpolated as shares of 576.
        layers: Number of decoder layers; layers 2, 6 and 15 of 32 are scaled to it.
    """
    return schedule(budget, layers, PUBLISHED, "raters")


def schedule(budget: object, layers: int, lists: Lists, score: Score) -> GapConfig:
    """Return three stages that keep what ``lists`` say of ``budget``, interpolated for a share, and rank by ``score``.

    Raises:
        ValueError: There is no list for the budget, or the decoder has not enough layers.
    """
    keeps: tuple[float | int, ...]
    value = plain(budget)
    if is_int(value) and value in lists:
        keeps = lists[value]
    elif isinstance(value, float):
        keeps = _interpolated(check_share(budget) * TOKENS, lists)
    else:
        raise ValueError(
            f"budget={shown(budget)}: expected {', '.join(map(str, sorted(lists)))}, or a share, a float in (0, 1]"
        )
    first, *rest = pruning_layers(FIRST_LAYERS, layers)
    later = tuple(Stage(keep, layer, score) for keep, layer in zip(keeps[1:], rest, strict=True))
    return GapConfig(keep=keeps[0], layer=first, score=score, then=later)


def _interpolated(budget: float, lists: Lists) -> tuple[float, ...]:
    """Shares left after each stage, between no tokens, the published lists, and all tokens."""
    known: dict[int, tuple[int, int, int]] = {
        0: (0, 0, 0),
        **dict(sorted(lists.items())),
        TOKENS: (TOKENS,) * 3,
    }
    lower = max(point for point in known if point < budget)
    upper = min(point for point in known if point >= budget)
    part = (budget - lower) / (upper - lower)
    counts = [low + part * (high - low) for low, high in zip(known[lower], known[upper], strict=True)]
    return tuple(rounded(count / TOKENS) for count in counts)
