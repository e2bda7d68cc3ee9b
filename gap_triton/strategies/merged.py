"""What every merge gives: rows, and their features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from gap_kernels.validation import FLOAT_DTYPES, ShapeChecker, check_distinct, check_range, is_readable
from torch import Tensor


class Merged(NamedTuple):
    """Tokens that go on, each under the row of a real token.

    Attributes:
        index: [G, K] int64, ascending; -1 = filler, on the left. A merged token has the row of one of the tokens that
            went into it, so that it has a position.
        features: [G, K, C]. A row's features are its own, bit for bit, unless something was merged into it. Filler is 0.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which is not needed here
    features: Tensor


def assemble(kept: Tensor, kept_features: Tensor, added: Tensor, features: Tensor) -> Merged:
    """Bring tokens that were kept and tokens that were added into one ascending order.

    Args:
        kept: [G, K] int64, -1 = filler.
        kept_features: [G, K, C], their features.
        added: [G, M] int64, other rows, -1 = filler.
        features: [G, M, C], theirs.

    Returns:
        K + M tokens.
    """
    index, source = torch.cat([kept, added], dim=1).sort(dim=1)
    both = torch.cat([kept_features, features], dim=1)
    return Merged(index, both.gather(1, source[..., None].expand_as(both)))


def check_merge(features: Tensor, rows: dict[str, Tensor], **others: Tensor) -> None:
    """Check the arguments of a merge.

    Args:
        features: [G, N, C].
        rows: [G, K] int64 by argument name.
        others: ``scores`` [G, N] float32, or vectors [G, N, E] of any float dtype, by argument name.

    Raises:
        ValueError: If one has another shape, dtype or device, or on the CPU a row is out of range or repeated.
    """
    shapes = ShapeChecker()
    shapes.check("features", features, "G N C", FLOAT_DTYPES)
    for name, value in others.items():
        if name == "scores":
            shapes.check(name, value, "G N", (torch.float32,))
        else:
            shapes.check(name, value, "G N E", FLOAT_DTYPES)
    for name, value in rows.items():
        shapes.check(name, value, "G K", (torch.int64,))
        if is_readable(value):
            check_range(name, value, -1, features.shape[1] - 1)
            check_distinct(name, value, features.shape[1])
