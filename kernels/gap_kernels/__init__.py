"""Operators for visual token pruning: a PyTorch reference and Triton kernels behind one function each."""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ImportError("gap_kernels needs torch, and it is not installed: pip install torch")

from .aggregate import spatial_aggregate
from .backends import backend
from .corrected import corrected_importance
from .cosine import text_cosine
from .flash_attention import AttentionOutput, attention
from .greedy import greedy_indices
from .importance import visual_importance
from .merge import collect_nearest, merge_nearest
from .prompt import PromptRows, read_prompt
from .prune import PrunedTokens, prune_by_score, prune_tokens
from .raters import text_raters
from .received import attention_received
from .region import grid_neighbours, topk_per_region
from .rotation import unrotate
from .scatter import scatter_rows
from .select import topk_indices
from .similarity import distinct_indices, least_similar_indices
from .windows import window_ranks

__all__ = [
    "AttentionOutput",
    "PromptRows",
    "PrunedTokens",
    "attention",
    "attention_received",
    "backend",
    "collect_nearest",
    "corrected_importance",
    "distinct_indices",
    "greedy_indices",
    "grid_neighbours",
    "least_similar_indices",
    "merge_nearest",
    "prune_by_score",
    "prune_tokens",
    "read_prompt",
    "scatter_rows",
    "spatial_aggregate",
    "text_cosine",
    "text_raters",
    "topk_indices",
    "topk_per_region",
    "unrotate",
    "visual_importance",
    "window_ranks",
]
