"""The attention function behind ``attn_implementation="gap_triton"``: dense attention that records what pruning needs.

An attention function runs inside the residual branch of its layer. It can *score* tokens but not *drop* them, so
it hands query and key to the state of the running forward, and `gap_triton.integration.hooks` drops before the next layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

from ..introspect import NAME, SCORES
from ..later_layers.masks import mask_for_attention
from ..state import ForwardState
from ..vision_tower.recording import current_recording

logger = logging.get_logger(__name__)

# What some models need of their attention, by keyword, which neither the scores nor the back ends here support.
MORE_THAN_DENSE = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "soft-capped attention logits",
    "position_bias": "a position bias",
}
NAMES_OF_MORE = frozenset(MORE_THAN_DENSE)
# What layers hand to their attention for others. Handed on, it would cost more than all else that is done here in a step.
IDLE = frozenset({"position_ids", "use_cache", "cache_position"}) - {
    *inspect.signature(sdpa_attention_forward).parameters,
    *inspect.unwrap(sdpa_attention_forward).__code__.co_consts,
}
FLASH_HEAD_DIM_LIMIT = 256
HALF_PRECISION = (torch.float16, torch.bfloat16)


def register() -> None:
    """Register the attention function and its mask function with transformers.

    Without a mask function under the same name transformers would pass no mask at all, and left-padded samples
    would silently attend to padding.
    """
    AttentionInterface.register(NAME, gap_attention_forward)
    AttentionMaskInterface.register(NAME, mask_for_attention)


def gap_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    gap_state: ForwardState | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute dense attention; in the scoring layer of a pruned prefill, query and key are left with ``gap_state``.

    Args:
        module: The attention layer that calls.
        query: [B, Hq, Q, D], after RoPE.
        key: [B, Hkv, S, D], after RoPE, cached tokens first.
        value: [B, Hkv, S, D].
        attention_mask: What the mask function made: None (plain causal, or one query) or [B, 1, Q, S].
        dropout: Probability to drop an attention weight.
        scaling: Factor of ``q k^T``, None = ``D ** -0.5``.
        is_causal: Whether rows see no later columns where there is no mask; None = as ``module`` says.
        gap_state: State of the running forward, None outside an attached model.
        **kwargs: What else the model passes on.

    Returns:
        Attention output [B, Q, Hq, D], and None in place of attention weights.
    """
    idle = IDLE.issuperset(kwargs)
    if not idle and not NAMES_OF_MORE.isdisjoint(kwargs):
        _refuse_more_than_dense(module, kwargs)
    # Read past nn.Module, which looks for what is missing among parameters and submodules, and raises, in every layer.
    if SCORES in module.__dict__:
        recording = current_recording.get()
        if recording is not None:
            recording.record_attention(module, query, key, attention_mask, scaling)
    elif gap_state is not None:
        if gap_state.run is not None:
            gap_state.record_attention(module, query, key, attention_mask, scaling)
    elif query.shape[2] > 1:  # a decode step may come without a state, and prunes nothing anyway
        _warn_not_attached(module)
    if query.is_cuda and _flash_applies(query, attention_mask, kwargs):
        flash = flash_attn_func()
        assert flash is not None
        return _flash_attention(flash, module, query, key, value, dropout, scaling, is_causal), None
    if idle:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )


def _warn_not_attached(module: nn.Module) -> None:
    if getattr(module, "is_causal", False) and getattr(module, "layer_idx", None) is not None:
        logger.warning_once(
            f'A decoder runs under attn_implementation="{NAME}" with no pruning attached: it is plain dense attention. '
            "Call gap_triton.attach(model, config) to prune."
        )


def _refuse_more_than_dense(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for keyword, what in MORE_THAN_DENSE.items():
        if kwargs.get(keyword) is not None:
            raise ValueError(
                f'attn_implementation="{NAME}" is plain dense attention, and {type(module).__name__} needs {what}: '
                "load the model with attn_implementation='eager'"
            )


@cache
def flash_attn_func() -> Any | None:
    """Return ``flash_attn.flash_attn_func``, or None where flash-attn is not installed."""
    try:
        from flash_attn import flash_attn_func as function
    except ImportError:
        return None
    return function


def _flash_applies(query: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> bool:
    # Of a query on a GPU. flash_attn_func takes no mask. Padding, ragged batches and sliding windows shorter than the
    # sequence arrive here as an explicit mask, and stay with sdpa.
    return (
        query.dtype in HALF_PRECISION
        and attention_mask is None
        and query.shape[-1] <= FLASH_HEAD_DIM_LIMIT
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and flash_attn_func() is not None
    )


def _flash_attention(
    flash: Callable[..., torch.Tensor],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
) -> torch.Tensor:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries = query.shape[2]
    if causal and 1 < queries < key.shape[2]:
        # No mask and more keys than queries: the unused tail of a static cache at prefill, as in sdpa's own path.
        key, value = key[:, :, :queries], value[:, :, :queries]
    return flash(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=bool(causal and queries > 1),
    )
