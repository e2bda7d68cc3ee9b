"""Tokens spread evenly over the image: a baseline of GAP (arXiv 2506.21873)."""

from __future__ import annotations

from ..config import GapConfig
from .budget import check_budget


def configure(budget: float | int = 0.25) -> GapConfig:
    """Keep tokens spread evenly over the image, before the decoder.

    The paper takes a uniform stride, which exists for few budgets; here the tokens are the first of an order whose
    every beginning is spread evenly, and which is the lattice of stride 2, 4, ... where there is one.

    Args:
        budget: Share or count of tokens kept.
    """
    return GapConfig(keep=check_budget(budget), layer=-1, score="spatial")
