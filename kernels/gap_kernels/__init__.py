"""Operators for visual token pruning: PyTorch definitions, registered with ``torch.library``."""

from .importance import visual_importance
from .prune import PrunedTokens, prune_by_score, prune_tokens
from .select import topk_indices

__all__ = ["PrunedTokens", "prune_by_score", "prune_tokens", "topk_indices", "visual_importance"]
