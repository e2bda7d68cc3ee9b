"""Choosing and merging visual tokens: pure functions on tensors, one idea per file.

``docs/strategies.md`` lists the values of each axis with their formulas and sources.
"""

from .coverage import STRIDE_SHARE, Coverage, choose
from .spatial import spatial_order

__all__ = [
    "STRIDE_SHARE",
    "Coverage",
    "choose",
    "spatial_order",
]
