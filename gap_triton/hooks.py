"""One forward of a pruned model, as the hooks see it.

A decoder's loop keeps hidden states, rotary embeddings, masks and ids in local variables that nothing outside can
rebind, so *every* layer after the pruning layer has a pre-hook that hands it the shortened ones. Dropping happens in
the pre-hook of the first later layer, which leaves all that a model adds after the pruning layer in place.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .answers import answer_rows, call_of, drafts_of, follows_prompt, refuse_lost_labels
from .arguments import by_name, cache_of
from .attention import CALL_KEY, NAME, STATE_KEY
from .config import BEFORE_THE_DECODER, asks_for_places
from .deepstack import add_behind, take_out
from .ids import refuse_ablation
from .kept import (
    begin,
    kept_tokens_of,
    original_length,
    refuse_continuation,
    refuse_pruned_cache,
    settle,
)
from .later import shorten
from .models import check_layers, layer_type
from .outputs import refuse_router_logits, restore_rows
from .places import places_of
from .prompt import (
    decide,
    find_visual_tokens,
    looks_ahead,
    position_ids_of,
    read_prompt,
    real_positions,
)
from .prune import drop
from .raters import find_raters
from .state import Attachment, Call, ForwardState, remember_selection
from .static import fit
from .vision.choose import choose_before_the_decoder
from .vision.watch import watch_tower
from .visual_mask import VISUAL_MASK, named_visual_tokens

logger = logging.get_logger(__name__)

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def before_head(
    model: PreTrainedModel, args: Args, kwargs: Kwargs, *, attachment: Attachment
) -> tuple[Args, Kwargs]:
    """Pass on what the module with the language head would keep to itself."""
    args, kwargs = by_name(model, args, dict(kwargs))
    return args, {**kwargs, CALL_KEY: _call_of(kwargs, attachment)}


def _call_of(kwargs: Kwargs, attachment: Attachment) -> Call:
    if kwargs.get("output_attentions") and attachment.text.config._attn_implementation == NAME:
        raise ValueError(
            "output_attentions=True: attention weights are not computed under "
            f'attn_implementation="{NAME}". gap_triton.last_selection(model).score holds what ranked the visual tokens; '
            "for the weights of every layer, load the model with attn_implementation='eager'"
        )
    return call_of(kwargs)


def before_owner(
    owner: PreTrainedModel, args: Args, kwargs: Kwargs, *, attachment: Attachment
) -> tuple[Args, Kwargs]:
    """Start the state of this forward where ``input_ids`` or ``visual_mask`` can be seen."""
    args, kwargs = by_name(owner, args, dict(kwargs))
    visual_mask = kwargs.pop(VISUAL_MASK, None)
    call = kwargs.pop(CALL_KEY, None) or _call_of(kwargs, attachment)
    state = ForwardState(config=attachment.config, attachment=attachment, visual=None, call=call)
    training = owner.training or attachment.text.training
    state.enabled = attachment.text.config._attn_implementation == NAME and not training
    if training:
        logger.warning_once(
            "gap_triton prunes at inference only: in training mode the model runs dense and unpruned. Call model.eval() "
            "to prune."
        )
    if state.enabled:
        input_ids, embeds = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if visual_mask is not None:
            state.visual = named_visual_tokens(
                owner, visual_mask, input_ids, embeds, cache_of(kwargs), call.drafts
            )
        elif owner is not attachment.text:
            state.visual = find_visual_tokens(owner, input_ids, embeds)
        else:
            _say_that_nothing_is_named(owner, embeds if input_ids is None else input_ids)
        state.given_mask = kwargs.get("attention_mask")
        if state.visual is not None:
            state.owner_kwargs = {**kwargs, "input_ids": input_ids}  # some models hand it on by position
            watch_tower(state)
    kwargs[STATE_KEY] = state
    return args, kwargs


def _say_that_nothing_is_named(decoder: PreTrainedModel, inputs: torch.Tensor | None) -> None:
    if inputs is not None and inputs.shape[1] > 1:
        logger.warning_once(
            f"{type(decoder).__name__} got a prompt and no visual_mask, so gap_triton prunes nothing in it. Pass "
            "visual_mask, a [B, Q] bool tensor that is True at visual tokens, to forward() or generate() to prune."
        )


def before_text(text: PreTrainedModel, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """Decide what this forward drops, and find out what the cache already lacks."""
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None or not state.enabled:
        refuse_pruned_cache(cache_of(by_name(text, args, kwargs)[1]))
        return None
    state.entered = True
    args, kwargs = by_name(text, args, kwargs)
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    batch, queries = inputs.shape[:2]
    # What the caller gave says what is padding. Some models have made a mask of their own from it by now.
    cache, mask = cache_of(kwargs), state.given_mask
    state.kept = state.before = kept_tokens_of(cache, batch)
    state.batch, state.queries = batch, queries
    if state.kept is None and queries <= 1:
        fit(cache, {})
        return None
    state.past = original_length(cache, state.kept, kwargs.get("cache_position"), queries)
    state.ready_made = isinstance(mask, torch.Tensor) and mask.dim() == 4
    state.real = real_positions(mask, state.past, queries, batch, layer_type(text.config, 0))
    verifies = queries > 1 and state.past > 0 and follows_prompt(state, inputs.device)
    if state.visual is not None and not verifies:
        kwargs = _plan(state, kwargs, len(text.layers))
    state.owner_kwargs = {}
    if state.drops or (state.kept is not None and state.kept.ids != "kept"):
        state.position_ids = position_ids_of(kwargs.get("position_ids"), state.past, queries, inputs.device)
    if state.drops:
        assert state.position_ids is not None
        refuse_ablation(state.config, text)
        refuse_router_logits(state, kwargs)
        kwargs = take_out(state, kwargs)

    if state.kept is None:
        if state.drops:
            begin(state, cache)
        else:
            fit(cache, {})
        return args, kwargs
    if queries > 1 and not verifies:
        refuse_continuation(state.kept, state.config if state.drops else None, queries, state.sees_image)
        new = None if state.real is None else state.real[:, state.past :]
        if not state.ready_made and looks_ahead(kwargs.get("attention_mask"), new):
            raise ValueError(
                "attention_mask: this model lets prompt tokens see later ones, which a pruned cache can't take in another "
                "turn: start a new cache with the whole conversation"
            )
    state.kept.settled = True
    begin(state, cache)
    return args, kwargs


def _plan(state: ForwardState, kwargs: Kwargs, layers: int) -> Kwargs:
    """Decide what every stage drops; returns the decoder's keyword arguments, with merged tokens put in."""
    assert state.visual is not None
    assert isinstance(state.past, int)
    new = None if state.real is None else state.real[:, state.past :]
    state.drafts = drafts_of(state.call, state.visual)
    prompt = read_prompt(state.visual, new, answer_rows(state.call, state.drafts, state.visual))
    state.sees_image = any(prompt.visual_counts)
    if not state.sees_image:
        return kwargs
    stages = state.config.stages
    if stages[0].layer == BEFORE_THE_DECODER:
        state.chosen, kwargs = choose_before_the_decoder(state, prompt, stages[0], kwargs)
    state.drops = decide(prompt, stages, state.chosen)
    if not state.drops:
        return kwargs
    check_layers(state.config, layers)
    refuse_lost_labels(state.call, prompt, state.drops[-1].keep)
    state.prompt = prompt
    if any(stage.score == "raters" for stage in stages):
        state.raters = find_raters(prompt, kwargs)
    if any(asks_for_places(stage) for stage in stages if stage.layer != BEFORE_THE_DECODER):
        state.places = places_of(state, prompt)
    return kwargs


def before_layer(layer: Any, args: Args, kwargs: Kwargs, *, index: int) -> tuple[Args, Kwargs] | None:
    """Hand a later layer its shortened inputs; the first of them drops."""
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None or not state.enabled:
        return None
    if state.kept is None and not state.drops:
        return None
    first = state.drops[0].stage.layer if state.drops else state.kept.layers[0]  # type: ignore[union-attr]
    if index <= first:
        return None
    if len(args) > 1:
        raise RuntimeError(
            f"{type(layer).__name__} was handed {len(args) - 1} positional arguments besides hidden_states, which "
            "gap_triton can't tell apart: load the model with attn_implementation='sdpa' to run it unpruned"
        )
    kwargs = dict(kwargs)
    hidden_states = args[0] if args else kwargs.pop("hidden_states")
    if state.done:
        hidden_states = add_behind(state, hidden_states, index - 1)
    upcoming = state.next_drop
    if upcoming is not None and index == upcoming.stage.layer + 1:
        hidden_states = drop(state, upcoming, hidden_states, kwargs)
    shorten(state, hidden_states, kwargs, index)
    return (hidden_states,), kwargs


def after_text(text: PreTrainedModel, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Put the surviving rows back where they stood, so that logits and labels keep the shape of the prompt."""
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None or not state.enabled:
        return None
    settle(state.cache)
    if not state.drops:
        return None
    if state.done < len(state.drops):
        raise RuntimeError(
            f"{type(text).__name__} does not hand its keyword arguments to its layers, so nothing was dropped: load the "
            "model with attn_implementation='sdpa' to run it unpruned"
        )
    if state.selection is not None:
        remember_selection(state.attachment, state.selection)
    return restore_rows(state, output)


def after_owner(owner: PreTrainedModel, args: Args, kwargs: Kwargs, output: Any) -> None:
    """Stop looking at the vision encoder; say so if the owner kept its keyword arguments to itself.

    The decoder would have run unpruned without a word.
    """
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is not None and state.watch is not None:
        state.watch.stop()
    if state is not None and state.enabled and not state.entered:
        raise RuntimeError(
            f"{type(owner).__name__} does not hand its keyword arguments to its decoder, so nothing was dropped: load the "
            "model with attn_implementation='sdpa' to run it unpruned"
        )
