"""What a model is, by its config and its code; and names that several parts of this package share."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

NAME = "gap_triton"  # of the attention implementation
SCORES = "_gap_scores"  # marks the attention of a vision tower's scoring layer
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the name under which a modeling file calls the attention interface
TEXT_MODEL_NAMES = ("language_model", "text_model")
# Kinds of decoder layers: those that look at all tokens, or at those of a window; those that have a state.
WHOLE = ("full_attention", "indexed_attention")
SLIDING = ("sliding_attention", "hybrid_sliding")
CHUNKED = "chunked_attention"
RECURRENT = ("linear_attention", "conv")
WITHOUT_ATTENTION = (*RECURRENT, "moe", "mlp")
BY_PLACES = ("minimax_m3_sparse",)  # compare position ids with places in their cache
TOKEN_ID_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def attention_name(config: Any) -> str | None:
    """Return ``config._attn_implementation``, past the slow look-up of configs where it is stored as this release does."""
    if torch.compiler.is_compiling():
        name: str | None = config._attn_implementation
        return name
    stored = object.__getattribute__(config, "__dict__").get("_attn_implementation_internal")
    return config._attn_implementation if stored is None else stored


def visual_token_ids(config: Any) -> list[int]:
    """Return the ids of the placeholder tokens that stand for visual features in ``config``'s vocabulary."""
    ids = {getattr(config, name, None) for name in TOKEN_ID_FIELDS}
    return sorted(i for i in ids if isinstance(i, int))


def text_model_of(module: nn.Module) -> PreTrainedModel | None:
    """Return the decoder stack below ``module``, None where ``module`` is not the core of a VLM."""
    if not isinstance(module, PreTrainedModel):
        return None
    # Some owners hold the decoder with its language-model head around it, some as their plain "model".
    children = [module._modules.get(name) for name in TEXT_MODEL_NAMES]
    children += [getattr(child, "model", None) for child in children]
    if visual_token_ids(module.config):
        children.append(module._modules.get("model"))
    for child in children:
        if isinstance(child, PreTrainedModel) and isinstance(child._modules.get("layers"), nn.ModuleList):
            return child
    return None


def calls_interface(module: nn.Module) -> bool:
    """Return whether ``module`` is an attention module that calls transformers' attention interface."""
    return INTERFACE in inspect.unwrap(type(module).forward).__code__.co_names


def layer_type(config: Any, index: int) -> str:
    """Return the attention type of decoder layer ``index``: ``"full_attention"``, ``"sliding_attention"`` or another."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return layer_types[index]
    slides = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    return "sliding_attention" if slides else "full_attention"


def sliding_window(config: Any, index: int) -> int | None:
    """Return the sliding window of decoder layer ``index`` in tokens, None where it attends to everything."""
    return int(config.sliding_window) if layer_type(config, index) in SLIDING else None


def attention_chunk(config: Any, index: int) -> int | None:
    """Return how many tokens make one of the chunks in which decoder layer ``index`` attends, None where there are none."""
    return getattr(config, "attention_chunk_size", None) if layer_type(config, index) == CHUNKED else None
