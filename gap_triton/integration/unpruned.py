"""Warnings, once each, about runs that could prune and don't; and refusals of runs that would hide what was dropped."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..arguments import by_name
from ..attachment import Attachment
from ..introspect import NAME

logger = logging.get_logger(__name__)

HOW_TO_NAME = "a [B, Q] bool tensor that is True at visual tokens"


def warn_not_pruned(owner: PreTrainedModel, attachment: Attachment, inputs: torch.Tensor | None) -> None:
    """Warn of training mode, and of another implementation of attention that was set past transformers' methods."""
    if owner.training or attachment.text.training:
        logger.warning_once(
            "gap_triton prunes at inference only: in training mode the model runs dense and unpruned. Call model.eval() "
            "to prune."
        )
    elif (other := attachment.text.config._attn_implementation) != NAME and is_prompt(inputs):
        logger.warning_once(
            f"gap_triton is attached to {type(owner).__name__}, whose decoder runs under {other!r}, so nothing is pruned. "
            f'Call model.set_attn_implementation("{NAME}") or gap_triton.attach(model, config) to prune, or '
            "gap_triton.detach(model)."
        )


def warn_no_visual_mask(decoder: PreTrainedModel, inputs: torch.Tensor | None) -> None:
    """Warn of a prompt that a decoder alone was given without ``visual_mask``."""
    if is_prompt(inputs):
        logger.warning_once(
            f"{type(decoder).__name__} got a prompt and no visual_mask, so gap_triton prunes nothing in it. Pass "
            f"visual_mask, {HOW_TO_NAME}, to forward() or generate() to prune."
        )


def warn_no_placeholder(owner: PreTrainedModel) -> None:
    """Warn of ``inputs_embeds`` in which no row is a placeholder; the prompt has been read, so this is known."""
    logger.warning_once(
        f"{type(owner).__name__} got inputs_embeds without input_ids, and no row of them is the embedding "
        "of an image placeholder, so gap_triton prunes nothing in them. If image features are merged into them already, "
        f"pass visual_mask, {HOW_TO_NAME}, to this module's forward() or to generate() to prune."
    )


def warn_owner_skipped(
    text: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], attachment: Attachment
) -> None:
    """Warn of a prompt that a decoder was given past the module that sees where its visual tokens are."""
    if not attachment.prunes(text) or attachment.closing:
        return
    args, kwargs = by_name(text, args, kwargs)
    inputs = kwargs.get("inputs_embeds")
    if is_prompt(inputs if inputs is not None else args[0] if args else kwargs.get("input_ids")):
        logger.warning_once(
            f"{type(text).__name__} was called by itself, past {type(attachment.owner).__name__}, which tells gap_triton "
            f"where visual tokens are, so nothing is pruned. Pass visual_mask, {HOW_TO_NAME}, to this call to prune."
        )


def warn_of_zeros(head: PreTrainedModel) -> None:
    """Warn of a head that may read other rows than the last, as one that generates or classifies the whole does not."""
    if not head.can_generate() and not type(head).__name__.endswith("ForSequenceClassification"):
        logger.warning_once(
            f"{type(head).__name__} gets zeros as the last hidden state of tokens that gap_triton drops. What it reads of "
            "the last token is right; a mean over all tokens, or an output of each, is not."
        )


def refuse_paged_cache(cache: Any | None) -> None:
    """Raise ValueError for a cache of continuous batching, where one row holds the tokens of several requests."""
    if type(cache).__name__ == "PagedAttentionCache":
        raise ValueError(
            "a PagedAttentionCache holds the tokens of several requests in one row, which gap_triton can't prune: use "
            "generate(), or call gap_triton.detach(model) before continuous batching"
        )


def refuse_export() -> None:
    """Raise ValueError while `torch.export` traces a prompt: how many rows later layers get is read from the prompt."""
    if torch.compiler.is_exporting():
        raise ValueError(
            "torch.export can't take in a prompt of a model that is pruned, whose later layers get as many rows as each "
            "prompt keeps: call gap_triton.detach(model) first, or export its vision encoder or a step of decoding"
        )


def is_prompt(inputs: torch.Tensor | None) -> bool:
    """Return whether ``inputs`` [B, Q, ...] are more than one token, so no step of decoding."""
    return inputs is not None and inputs.shape[1] > 1
