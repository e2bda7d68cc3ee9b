"""How near two generations are to each other."""

from __future__ import annotations

import torch

TOLERANCE = 1e-4
"""Of logits in float32, between a pruned run and its oracle."""


def error(a, b) -> float:
    """The largest difference between the logits of two generations, over all their steps."""
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def same(a, b) -> bool:
    """Whether two generations are alike to the bit."""
    return torch.equal(a.sequences, b.sequences) and error(a, b) == 0.0
