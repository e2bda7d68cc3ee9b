"""What to prune, where and by which rule: one frozen, validated dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Literal, get_args

import numpy as np

Score = Literal["last_token", "text", "random"]
Ids = Literal["kept", "compacted", "permuted"]

BEFORE_THE_DECODER = -1


@dataclass(frozen=True)
class GapConfig:
    """How visual tokens are chosen and which position ids the survivors carry.

    Attributes:
        keep: A float in (0, 1] is the share of each sample's visual tokens that survives, rounded up; an int >= 1
            is the number that survives per sample (a sample with fewer keeps all of them).
        layer: 0-based decoder layer. Tokens are scored in this layer's attention and dropped before the next layer.
            ``-1`` drops them before the first decoder layer, where only ``score="random"`` is possible.
        score: What ranks a visual token. ``"last_token"`` is the attention of the last prompt token, mean over
            heads (FastV, arXiv 2403.06764, section 4.1); ``"text"`` is the same, averaged over the text rows after
            the sample's last visual token; ``"random"`` draws from ``seed``.
        ids: Which position ids the survivors carry in the later layers. ``"kept"`` is GAP (arXiv 2506.21873): each
            survivor, the text after it and every generated token keep the id that they have without pruning.
            ``"compacted"`` numbers the survivors 0, 1, 2, ...; ``"permuted"`` does that with the visual survivors in
            score order. The last two are the defects that the paper names, for measuring their effect only.
        seed: Seed of ``score="random"``. The draw is one of a whole batch: a sample's tokens depend on its row.

    Raises:
        ValueError: A field is out of range or of the wrong type; the message names the field, the value and what
            is allowed.
    """

    keep: float | int = 0.5
    layer: int = 2
    score: Score = "last_token"
    ids: Ids = "kept"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_keep()
        if not _is_int(self.layer) or self.layer < BEFORE_THE_DECODER:
            raise ValueError(
                f"GapConfig.layer={self.layer!r}: expected a decoder layer, an int >= 0, or -1 for before the first"
            )
        for field, allowed in (("score", get_args(Score)), ("ids", get_args(Ids))):
            value = getattr(self, field)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(
                    f"GapConfig.{field}={value!r}: expected one of {', '.join(map(repr, allowed))}"
                )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"GapConfig.seed={self.seed!r}: expected an int in 0..2**63 - 1")
        if self.layer == BEFORE_THE_DECODER and self.score != "random":
            raise ValueError(
                f"GapConfig.score={self.score!r} with layer=-1: before the first decoder layer there is no attention "
                "to score by; use score='random', or a layer >= 0"
            )
        # numpy's numbers are accepted; plain ones are kept. A narrow float is read as the decimal that it prints.
        object.__setattr__(self, "keep", int(self.keep) if _is_int(self.keep) else float(str(self.keep)))
        object.__setattr__(self, "layer", int(self.layer))
        object.__setattr__(self, "seed", int(self.seed))

    def _check_keep(self) -> None:
        if _is_int(self.keep):
            if self.keep < 1:
                raise ValueError(
                    f"GapConfig.keep={self.keep!r}: an int counts the tokens kept and must be >= 1"
                )
        elif not isinstance(self.keep, (float, np.floating)) or not 0.0 < float(self.keep) <= 1.0:
            raise ValueError(
                f"GapConfig.keep={self.keep!r}: expected a float in (0, 1] (a share) or an int >= 1 (a count)"
            )

    def count(self, visual_tokens: int) -> int:
        """Number of visual tokens that survive out of ``visual_tokens``.

        A share is read as the decimal that was written, so ``keep=0.7`` of 10 is 7 and not 8.
        """
        if _is_int(self.keep):
            return min(int(self.keep), visual_tokens)
        return math.ceil(Fraction(repr(self.keep)) * visual_tokens)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
