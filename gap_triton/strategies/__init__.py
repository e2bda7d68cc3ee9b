"""Choosing and merging visual tokens: pure functions on tensors, one idea per file.

``docs/strategies.md`` lists the values of each axis with their formulas and sources.
"""

from gap_kernels.prune.coverage import STRIDE_SHARE

from .aggregation import LLAVA, LLAVA_NEXT, QWEN, AggregationRule, aggregate
from .average import average
from .cluster import cluster
from .contextual import contextual, contextual_count
from .coverage import Coverage, choose
from .merged import Merged
from .nearest import nearest
from .outliers import outlier_count, similarity_outlier_count
from .relevance import raters, text_similarity
from .spatial import spatial_order

__all__ = [
    "LLAVA",
    "LLAVA_NEXT",
    "QWEN",
    "STRIDE_SHARE",
    "AggregationRule",
    "Coverage",
    "Merged",
    "aggregate",
    "average",
    "choose",
    "cluster",
    "contextual",
    "contextual_count",
    "nearest",
    "outlier_count",
    "raters",
    "similarity_outlier_count",
    "spatial_order",
    "text_similarity",
]
