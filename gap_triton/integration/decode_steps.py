"""Decode steps of one token, by what a module is called with: most need little of the hooks, or nothing.

What a module runs in place of its hooks (`step_calls.py`) in a step in which they have nothing to do, or in one behind
prompts without filler on a cache that grows: its later layers need nothing unless the model makes a mask.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..arguments import CACHE, HEAD_KEY, OWN_ARGUMENTS, STATE_KEY, cache_of
from ..attachment import Attachment
from ..introspect import text_model_of
from ..kv_cache.kept_tokens import (
    KeptTokens,
    dynamic_length,
    has_plain_steps,
    is_unpruned,
    kept_tokens_of,
    leave_step,
    step_left,
    take_step,
)
from ..prefill.answers import GENERATED
from ..state import DecodeStep, ForwardState, HeadArguments, OwnerArguments
from .decoder_run import run_of_step
from .step_calls import NO_STEP

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

OURS = frozenset({HEAD_KEY, *OWN_ARGUMENTS})
NOTHING_OF_THE_HEAD = HeadArguments(reached_owner=True)


def row_of(args: Args, kwargs: Kwargs) -> torch.Tensor | None:
    """Return what a module gets, tokens or their embeddings, where that is one of each sample; else None."""
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    return inputs if inputs is not None and len(args) < 2 and inputs.shape[1] == 1 else None


def step_row_of(args: Args, kwargs: Kwargs) -> torch.Tensor | None:
    """Return `row_of` a call, from which nothing can be dropped; None where it asks for what must be refused."""
    return None if GENERATED in kwargs or kwargs.get("output_attentions") else row_of(args, kwargs)


def has_ours(kwargs: Kwargs) -> bool:
    """Return whether arguments that only the hooks know are among ``kwargs``."""
    return not OURS.isdisjoint(kwargs)


@dataclass(eq=False)
class PlainStep:
    """A decode step whose later layers need nothing unless the model makes a mask. Lies on the cache while it runs.

    Attributes:
        attachment: The attachment that it runs under.
        row: [B, 1] or [B, 1, C], what it adds.
        attention_mask: The mask as the caller gave it.
        cache: The KV cache.
        kept: What its layers hold.
        tokens: Number of tokens that the cache stands for after it.
        made: The state, once a layer has asked for it.
        reached_decoder: The decoder has been called.
    """

    attachment: Attachment
    row: torch.Tensor
    attention_mask: Any
    cache: Any
    kept: KeptTokens
    tokens: int
    made: ForwardState | None = None
    reached_decoder: bool = False

    def state(self) -> ForwardState:
        """Return the state of the forward, which its layers share."""
        if self.made is None:
            attachment = self.attachment
            arguments = OwnerArguments(attention_mask=self.attention_mask)
            state = ForwardState(attachment.config, attachment, NOTHING_OF_THE_HEAD, arguments)
            begin_run = functools.partial(
                run_of_step, state, attachment.text, self.row, self.kept, {CACHE: self.cache}
            )
            state.step = DecodeStep(self.kept, self.cache, self.tokens, False, begin_run)
            state.reached_decoder = state.passes = True
            self.made = state
        return self.made

    def end(self) -> None:
        """Take it off the cache; its layers have run, or failed."""
        take_step(self.cache)
        if self.made is not None:
            self.made.step = None  # which knows the state: a circle


def head_step(
    attachment: Attachment,
    owner_name: str,
    takes_kwargs: bool,
    model: PreTrainedModel,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    """Run a step of the module with the language head, where it has nothing to pass on that it would not; see `ShortWay`."""
    if (
        step_row_of(args, kwargs) is not None
        and model._modules.get(owner_name) is attachment.owner
        and (takes_kwargs or not has_ours(kwargs))
    ):
        return model.forward(*args, **kwargs)
    return NO_STEP


def owner_step(attachment: Attachment, owner: PreTrainedModel, args: Args, kwargs: Kwargs) -> Any:
    """Run a step of the module that receives ``input_ids``, on a cache from which nothing was dropped or a plain step."""
    row = step_row_of(args, kwargs)
    if row is None or not OURS.isdisjoint(kwargs):
        return NO_STEP
    cache = cache_of(kwargs)
    if is_unpruned(cache):
        return owner.forward(*args, **kwargs)
    if not has_plain_steps(cache):
        return NO_STEP
    call = object()
    attachment.running[call] = threading.get_ident()
    try:
        # Seen to be running, it is waited for by whoever detaches from here on.
        if attachment.closing or not _layers_carry(attachment) or not attachment.prunes(owner):
            return NO_STEP
        return _run_plain_step(attachment, owner, row, cache, args, kwargs)
    finally:
        attachment.running.pop(call, None)
        if attachment.closing or attachment.resting:
            attachment.settle()


def _layers_carry(attachment: Attachment) -> bool:
    """Whether the decoder has the layers that carry what they are asked by; none do where everything is kept."""
    layers: Any = attachment.text._modules["layers"]
    return tuple(layers._modules.values()) == attachment.layers


def _run_plain_step(
    attachment: Attachment, owner: PreTrainedModel, row: torch.Tensor, cache: Any, args: Args, kwargs: Kwargs
) -> Any:
    kept = kept_tokens_of(cache, row.shape[0])
    assert kept is not None
    tokens = dynamic_length(cache, kept) + 1
    kept.complete = True
    step = PlainStep(attachment, row, kwargs.get("attention_mask"), cache, kept, tokens)
    step.reached_decoder = owner is attachment.text
    leave_step(cache, step)
    try:
        output = owner.forward(*args, **kwargs)
    finally:
        step.end()
    if not step.reached_decoder:
        refuse_unreached(owner, attachment)
    return output


def text_step(attachment: Attachment, text: PreTrainedModel, args: Args, kwargs: Kwargs) -> Any:
    """Run a step of the decoder, which its owner has begun or on a cache from which nothing was dropped."""
    if STATE_KEY in kwargs or not OURS.isdisjoint(kwargs):
        return NO_STEP
    cache = cache_of(kwargs)
    step = step_left(cache)
    if step is not None:
        step.reached_decoder = True
    elif not is_unpruned(cache) or row_of(args, kwargs) is None:
        return NO_STEP
    return text.forward(*args, **kwargs)


def refuse_unreached(owner: PreTrainedModel, attachment: Attachment) -> None:
    """Raise RuntimeError because the decoder was not called with what tells it what was dropped, or is to be.

    Otherwise it would have run unpruned without a warning.
    """
    if text_model_of(owner) is not attachment.text and owner is attachment.owner is not attachment.text:
        raise RuntimeError(
            f"the decoder of {type(owner).__name__} was replaced after gap_triton was attached, so nothing was dropped: "
            "call gap_triton.configure(model, config) or gap_triton.attach(model, config) again"
        )
    raise RuntimeError(
        f"{type(owner).__name__} does not hand its keyword arguments to its decoder, so nothing was dropped: load the "
        "model with attn_implementation='sdpa' to run it unpruned"
    )
