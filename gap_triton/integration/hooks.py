"""The hooks of one forward of a pruned model.

A decoder's loop keeps hidden states, rotary embeddings, masks and ids in local variables that nothing outside can
rebind, so *every* layer after the pruning layer has a pre-hook that hands it the shortened ones. Dropping happens in
the pre-hook of the first later layer, which leaves all that a model adds after the pruning layer in place.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..arguments import (
    HEAD_KEY,
    STATE_KEY,
    VISUAL_ENCODING,
    VISUAL_GRID,
    VISUAL_MASK,
    VISUAL_PROMPT,
    by_name,
    cache_of,
)
from ..attachment import Attachment, attach_lock, remember_selection
from ..calls import current_config
from ..introspect import NAME, attention_chunk, layer_type, sliding_window
from ..kv_cache.kept_tokens import (
    KeptRows,
    has_plain_steps,
    is_static,
    is_unpruned,
    kept_tokens_of,
    make_fixed_columns,
    mark_finished,
    refuse_pruned_cache,
    step_left,
    store,
)
from ..kv_cache.static_cache import fit
from ..later_layers.deepstack import add_features
from ..later_layers.inputs import shorten
from ..later_layers.outputs import restore_rows
from ..later_layers.steps import later_cache_position, later_mask, later_mask_known
from ..prefill.answers import head_arguments_of
from ..prefill.drop import drop_tokens
from ..prefill.prompt import find_visual_rows
from ..state import DecoderRun, DecodeStep, Drop, ForwardState, HeadArguments, OwnerArguments, Prefill
from ..vision.needs import start_recorder
from ..vision_tower.hooks import ENCODER_OUTPUTS
from ..vision_tower.sizes import HOST_SIZES
from .decode_steps import NOTHING_OF_THE_HEAD, has_ours, refuse_unreached, row_of, step_row_of
from .decoder_run import (
    begin_to_fill,
    length_before,
    run_of_prompt,
    run_of_step,
    step_of,
    takes_masks_only,
)
from .layer_calls import put_before
from .prepare import named_prompt
from .read_ahead import read_ahead
from .stages import check_stages
from .supported_models import find_parts, why_not_in_decoder, why_own_attention
from .survivors_only import finish, hand_positions, hand_survivors
from .unpruned import (
    refuse_export,
    refuse_paged_cache,
    warn_no_visual_mask,
    warn_not_pruned,
    warn_owner_skipped,
)
from .visual_grid import named_grids
from .visual_mask import named_visual_tokens

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def before_head(
    model: PreTrainedModel,
    args: Args,
    kwargs: Kwargs | None = None,
    *,
    attachment: Attachment,
    owner_name: str,
    takes_kwargs: bool,
) -> tuple[Args, Kwargs] | None:
    """Pass on the arguments that the module with the language head would not hand on.

    Args:
        model: That module.
        args: Its positional arguments.
        kwargs: Its keyword arguments; None where the hook before this one has just removed it: then torch calls it once more
            without them.
        attachment: What is attached to the module that it holds.
        owner_name: The name under which it holds it.
        takes_kwargs: Its forward takes keyword arguments that it does not list.
    """
    if kwargs is None:
        return None
    if model._modules.get(owner_name) is not attachment.owner and model in attachment.heads:
        raise RuntimeError(
            f"{owner_name} of {type(model).__name__} was replaced after gap_triton was attached: call "
            "gap_triton.configure(model, config) or gap_triton.attach(model, config) again"
        )
    if step_row_of(args, kwargs) is not None and (takes_kwargs or not has_ours(kwargs)):
        return None
    args, kwargs = by_name(model, args, kwargs) if len(args) > 1 else (args, dict(kwargs))
    head = _head_arguments_of(kwargs, attachment)
    if not takes_kwargs:
        _refuse_lost_arguments(model, args, kwargs, head, attachment)
        return args, kwargs
    head.config = attachment.config
    kwargs[HEAD_KEY] = head  # of this call alone: it was packed for it
    return args, kwargs


@dataclass(eq=False)
class Removal:
    """How a hook takes itself off; in a box that torch.compile, which can't trace a handle, need not look into."""

    handle: Any = None


def after_head(
    model: PreTrainedModel,
    args: Args,
    kwargs: Kwargs,
    output: Any = None,
    *,
    attachment: Attachment,
    removal: Removal,
) -> None:
    """Refuse a head that did not hand its keyword arguments on; after one that did, take this hook off.

    Where the hook was removed right before it ran, the output comes in place of the keyword arguments.
    """
    head: HeadArguments | None = None if output is None else kwargs.get(HEAD_KEY)
    if head is None:
        return
    if not head.reached_owner:
        _refuse_lost_arguments(model, args, kwargs, head, attachment)
    elif not torch.compiler.is_compiling():
        removal.handle.remove()


def _refuse_lost_arguments(
    model: PreTrainedModel, args: Args, kwargs: Kwargs, head: HeadArguments, attachment: Attachment
) -> None:
    """Raise RuntimeError if ``model``, which hands nothing on, got arguments that its owner needs to prune."""
    labels = head.labels
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    inputs = [each for each in given if isinstance(each, torch.Tensor)]
    arguments = {
        VISUAL_MASK: kwargs.get(VISUAL_MASK) is not None,
        # Other labels than one per token belong to the whole input.
        "labels": isinstance(labels, torch.Tensor) and any(labels.shape == each.shape[:2] for each in inputs),
        "use_cache=False": head.generated > 0,
        "logits_to_keep": head.drafts > head.generated or head.logit_rows is not None,
    }
    names = [name for name, given in arguments.items() if given]
    if names and attachment.prunes(model):
        raise RuntimeError(
            f"{type(model).__name__} does not hand further keyword arguments on to {type(attachment.owner).__name__}, which "
            f"must know {' and '.join(names)} to prune: let it take **kwargs and hand them on, leave "
            f"{'it' if len(names) == 1 else 'them'} out, or call gap_triton.detach(model) to run it unpruned"
        )


def _head_arguments_of(kwargs: Kwargs, attachment: Attachment) -> HeadArguments:
    if kwargs.get("output_attentions") and attachment.text.config._attn_implementation == NAME:
        raise ValueError(
            "output_attentions=True: attention weights are not computed under "
            f'attn_implementation="{NAME}". gap_triton.last_selection(model).score holds what ranked the visual tokens; '
            "for the weights of every layer, load the model with attn_implementation='eager'"
        )
    return head_arguments_of(kwargs)


def before_owner(
    owner: PreTrainedModel, args: Args, kwargs: Kwargs | None = None, *, attachment: Attachment
) -> tuple[Args, Kwargs] | None:
    """Start the state of this forward where ``input_ids`` or ``visual_mask`` can be seen."""
    if kwargs is None:
        return None  # as in `before_head`
    if step_row_of(args, kwargs) is not None and not has_ours(kwargs):
        cache = cache_of(kwargs)
        if is_unpruned(cache):
            return None
        if has_plain_steps(cache) and not attachment.closing:
            return args, {**kwargs, STATE_KEY: _begin_step(owner, kwargs, attachment)}
    return _begin(owner, args, kwargs, attachment)


def _begin_step(owner: PreTrainedModel, kwargs: Kwargs, attachment: Attachment) -> ForwardState:
    """The state of a decode step that holds no image, on a cache that lacks tokens."""
    arguments = OwnerArguments(attention_mask=kwargs.get("attention_mask"))
    state = ForwardState(
        attachment.config, attachment, NOTHING_OF_THE_HEAD, arguments, attachment.prunes(owner)
    )
    _add_to_running(state)
    return state


def _begin(owner: PreTrainedModel, args: Args, kwargs: Kwargs, attachment: Attachment) -> tuple[Args, Kwargs]:
    args, kwargs = by_name(owner, args, kwargs) if len(args) > 1 else (args, dict(kwargs))
    visual_mask, visual_grid = kwargs.pop(VISUAL_MASK, None), kwargs.pop(VISUAL_GRID, None)
    prepared, encoding = kwargs.pop(VISUAL_PROMPT, None), kwargs.pop(VISUAL_ENCODING, None)
    if prepared is not None:
        prepared = named_prompt(prepared)
    head = kwargs.pop(HEAD_KEY, None) or _head_arguments_of(kwargs, attachment)
    head.reached_owner = True
    state = ForwardState(attachment.config, attachment, head, OwnerArguments())
    state.enabled = attachment.prunes(owner) and not (
        attachment.closing and current_config(attachment) is None
    )
    input_ids, embeds = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if not state.enabled:
        warn_not_pruned(owner, attachment, embeds if input_ids is None else input_ids)
    else:
        visual = None
        if visual_mask is not None:
            visual = named_visual_tokens(
                owner, visual_mask, input_ids, embeds, cache_of(kwargs), head.drafts, prepared is not None
            )
        elif attachment.owner is not attachment.text:
            visual = find_visual_rows(owner, input_ids, embeds)
        else:
            warn_no_visual_mask(owner, embeds if input_ids is None else input_ids)
        sought = visual_mask is None and input_ids is None
        state.owner = OwnerArguments(visual, kwargs.get("attention_mask"), sought, prepared)
        if visual is not None:
            refuse_export()
            config = current_config(attachment, head)
            state.enabled = config is not None
            state.config = config or state.config
    if state.enabled and state.owner.visual is not None:
        refuse_paged_cache(cache_of(kwargs))
        state.owner.kwargs = {**kwargs, "input_ids": input_ids}  # some models hand it on by position
        if visual_grid is not None:
            state.owner.kwargs[VISUAL_GRID] = named_grids(visual_grid)
        if prepared is not None:
            state.owner.kwargs[HOST_SIZES] = prepared.sizes
        if encoding is not None:
            state.owner.kwargs[ENCODER_OUTPUTS] = {"image": encoding}
        if not state.config.changes_nothing:
            read_ahead(state)
            start_recorder(state)
    _add_to_running(state)
    kwargs[STATE_KEY] = state
    return args, kwargs


def _add_to_running(state: ForwardState) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled forward can't be interrupted by `detach`
    attachment = state.attachment
    attachment.running[state] = threading.get_ident()
    if attachment.closing:
        with attach_lock:  # a removal that began before this call was seen comes to its end first
            state.enabled = state.enabled and bool(attachment.handles)


def _end(state: ForwardState) -> None:
    if state.recorder is not None:
        state.recorder.stop()
    if not torch.compiler.is_compiling():
        state.attachment.running.pop(state, None)
        if state.attachment.closing or state.attachment.resting:
            state.attachment.settle()


def hook_layers(attachment: Attachment) -> None:
    """Put hooks on the layers of the decoder where its configuration drops tokens, else take them off."""
    text = attachment.text
    with attach_lock:
        # Kept, because transformers' configs look attributes up slowly, and every layer asks in every step.
        layers = range(len(text.layers))
        attachment.windows = tuple(sliding_window(text.config, index) for index in layers)
        attachment.chunks = tuple(attention_chunk(text.config, index) for index in layers)
        attachment.kinds = tuple(layer_type(text.config, index) for index in layers)
        attachment.survivors_only = why_not_in_decoder(text) is not None
        attachment.own_attention = why_own_attention(text) is not None
        # A call that begins now sees this before it looks for the hooks, or is seen to be running.
        attachment.resting = attachment.config.changes_nothing
        if attachment.resting:
            attachment.settle()
        else:
            _put_on_layers(attachment)


def _put_on_layers(attachment: Attachment) -> None:
    """Put the hooks on, anew where the decoder has got other layers since; nothing to do where it has not."""
    layers = tuple(attachment.text.layers)
    if attachment.layers == layers:
        return
    for handle in attachment.layer_handles:
        handle.remove()
    attachment.layer_handles = [
        put_before(layer, functools.partial(before_layer, index=index)) for index, layer in enumerate(layers)
    ]
    attachment.layers = layers


def _follow_layers(attachment: Attachment, text: PreTrainedModel) -> None:
    """See to it that the layers carry their hooks in a forward that needs them."""
    if attachment.resting:  # a cache goes on that was pruned under another configuration
        _wake_layers(attachment)
        return
    layers = text._modules["layers"]._modules.values()
    # A replica of DataParallel has layers of its own, and what was compiled sees no others than it was compiled with.
    if torch.compiler.is_compiling() or tuple(layers) == attachment.layers or text is not attachment.text:
        return
    check_stages(attachment.config, find_parts(attachment.owner))  # the new layers may be others
    hook_layers(attachment)


def _wake_layers(attachment: Attachment) -> None:
    if not torch.compiler.is_compiling():
        with attach_lock:
            _put_on_layers(attachment)
    elif not attachment.layers:
        raise RuntimeError(
            "this KV cache was pruned, and goes on under a configuration that keeps everything: run the step without "
            "torch.compile, or call gap_triton.configure(model, config) with one that drops tokens"
        )


def _begin_without_owner(
    text: PreTrainedModel, args: Args, kwargs: Kwargs, attachment: Attachment
) -> tuple[Args, Kwargs]:
    """The decoder was called without its owner, with a mask that names the visual tokens."""
    args, kwargs = _begin(text, args, kwargs, attachment)
    state: ForwardState = kwargs[STATE_KEY]
    state.without_owner = True
    try:
        return before_text(text, args, kwargs, attachment=attachment) or (args, kwargs)
    except Exception:
        _end(state)  # no later hook sees it
        raise


def before_text(
    text: PreTrainedModel, args: Args, kwargs: Kwargs | None = None, *, attachment: Attachment
) -> tuple[Args, Kwargs] | None:
    """Decide what this forward drops, and find out what the cache already lacks."""
    if kwargs is None:
        return None  # as in `before_head`
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None:
        step = step_left(cache_of(kwargs))
        if step is not None:
            step.reached_decoder = True
            return None
        if not has_ours(kwargs) and row_of(args, kwargs) is not None and is_unpruned(cache_of(kwargs)):
            return None
        if kwargs.get(VISUAL_MASK) is not None:
            return _begin_without_owner(text, args, kwargs, attachment)
        warn_owner_skipped(text, args, kwargs, attachment)
    if state is None or not state.enabled:
        refuse_pruned_cache(cache_of(by_name(text, args, kwargs)[1]))
        return None
    state.reached_decoder = True
    if len(args) > 1:
        args, kwargs = by_name(text, args, kwargs)
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    kept = kept_tokens_of(cache_of(kwargs), inputs.shape[0])
    if inputs.shape[1] > 1:
        run, kwargs = run_of_prompt(state, text, inputs, kept, kwargs)
    elif kept is not None:
        state.step = step_of(state, text, inputs, kept, kwargs)
        if state.step is not None:
            kept.complete = True
            state.passes = not state.step.needs_mask
            _follow_layers(attachment, text)
            return args, kwargs
        run = run_of_step(state, text, inputs, kept, kwargs)
    else:
        fit(cache_of(kwargs), {})
        return None
    kwargs = _with_all_rows(kwargs, run is not None)
    if run is None:
        fit(cache_of(kwargs), {})
    else:
        _follow_layers(attachment, text)
        begin_to_fill(run, cache_of(kwargs))
        state.run = run
        if run.survivors_only:
            args, kwargs = hand_survivors(run, text, inputs, args, kwargs)
    state.owner.kwargs = {}
    return args, kwargs


def _with_all_rows(kwargs: Kwargs, shortened: bool) -> Kwargs:
    """``kwargs`` of a decoder that may end its last layers with fewer rows, which the head takes out anyway.

    Of rows that are ``shortened`` it does not know where they stand. Elsewhere Gemma 4 does so under sdpa only where no mask
    is needed for it, and does not ask that of an implementation that it doesn't know.
    """
    rows = kwargs.get("logits_to_keep")
    if not isinstance(rows, int) or not rows:
        return kwargs
    if shortened or rows > 1 or getattr(cache_of(kwargs), "is_compileable", False):
        return {**kwargs, "logits_to_keep": 0}
    return kwargs


def before_layer(layer: Any, args: Args, kwargs: Kwargs, *, index: int) -> tuple[Args, Kwargs] | None:
    """Hand a later layer its shortened inputs; the first of them drops."""
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None:
        return None
    step = state.step
    if step is not None:
        stage = step.kept.stage_at(index)
        if stage is None:
            return None
        if later_mask_known(step, kwargs.get("attention_mask")):
            return _hand_mask(step, stage, layer, args, kwargs)
        state.step, state.run = None, step.begin_run(length_before(step, index))
        state.passes = False
    run = state.run
    if run is None:
        return None
    if run.survivors_only:
        return hand_positions(run, args, kwargs, index)
    kept: KeptRows | None = None if run.kept is None else run.kept.at(index)
    drop = None if run.prefill is None else run.prefill.drop_before(index)
    if kept is None and drop is None:
        _keep_rotary(run.prefill, layer, kwargs, index)
        return None
    if run.attachment.survivors_only and len(args) > 1:
        args, kwargs = by_name(layer, args, kwargs)  # Gemma 4's inputs of each layer
    _refuse_positional(layer, args)
    kwargs = dict(kwargs)
    hidden_states = args[0] if args else kwargs.pop("hidden_states")
    hidden_states = add_features(run, hidden_states, index - 1)
    if run.prefill is not None and drop is not None:
        hidden_states, kept = _drop(run, run.prefill, drop, hidden_states, kwargs)
    if kept is not None:
        shorten(run, kept, hidden_states, kwargs, index)
    _keep_rotary(run.prefill, layer, kwargs, index)
    return (hidden_states,), kwargs


def _keep_rotary(prefill: Prefill | None, layer: Any, kwargs: Kwargs, index: int) -> None:
    """Keep what layer ``index`` rotates by, where it is the one that scores for the next stage."""
    drop = None if prefill is None else prefill.next_drop
    if prefill is not None and drop is not None and drop.stage.layer == index:
        name = "position_embeddings"
        if (
            f"{name}_local" in kwargs
        ):  # Gemma 3 before transformers 5: each layer is handed both, and takes its own
            name += "_local" if any(getattr(m, "is_sliding", False) for m in layer.modules()) else "_global"
        prefill.rotary = kwargs.get(name)


def _hand_mask(step: DecodeStep, stage: int, layer: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Hand a layer behind a stage its mask in a decode step."""
    _refuse_positional(layer, args)
    kwargs = {**kwargs, "attention_mask": later_mask(step, stage, kwargs.get("attention_mask"))}
    cache_position = kwargs.get("cache_position")
    if step.tokens is None and cache_position is not None:
        # Static caches of releases that have this argument write there: it must count from the layer's own length.
        kwargs["cache_position"] = later_cache_position(step, stage, cache_position)
    return args, kwargs


def _refuse_positional(layer: Any, args: Args) -> None:
    if len(args) > 1:
        raise RuntimeError(
            f"{type(layer).__name__} was handed {len(args) - 1} positional arguments besides hidden_states, which "
            "gap_triton can't tell apart: load the model with attn_implementation='sdpa' to run it unpruned"
        )


def _drop(
    run: DecoderRun, prefill: Prefill, drop: Drop, hidden_states: torch.Tensor, kwargs: Kwargs
) -> tuple[torch.Tensor, KeptRows]:
    """Drop, and record it in run and cache; returns the hidden states and what the layers from here on hold."""
    dropped = drop_tokens(run, prefill, drop, hidden_states, kwargs)
    run.kept, prefill.selection = dropped.kept, dropped.selection
    cache = cache_of(kwargs)
    store(cache, dropped.kept)
    if prefill.past == 0 and prefill.done == 1:
        fit(cache, {each.first_later: run.rows.queries - each.length for each in prefill.drops})
    return dropped.hidden_states, dropped.rows


def after_text(
    text: PreTrainedModel, args: Args, kwargs: Any, output: Any = None, *, attachment: Attachment
) -> Any:
    """Put the surviving rows back where they stood, so that logits and labels keep the shape of the prompt.

    After a forward that failed ``output`` is None. Where the hook was removed right before it ran, the output, maybe a dict
    of its own kind, comes in place of the keyword arguments.
    """
    if type(kwargs) is not dict:
        return None
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None:
        return None
    if state.without_owner:
        _end(state)
    state.step = None  # which knows the state: a circle would keep both, and what they hold, until Python looks for circles
    run = state.run
    if run is not None and run.survivors_only:
        finish(run, cache_of(kwargs), output)
    if run is None or output is None:
        return None
    mark_finished(run.cache)
    prefill = run.prefill
    if prefill is None:
        return None
    _prepare_steps(run)
    if prefill.next_drop is not None:
        raise RuntimeError(
            f"{type(text).__name__} does not hand its keyword arguments to its layers, so nothing was dropped: load the "
            "model with attn_implementation='sdpa' to run it unpruned"
        )
    if prefill.selection is not None:
        remember_selection(run.attachment, prefill.selection)
    return restore_rows(run, prefill, output)


def _prepare_steps(run: DecoderRun) -> None:
    """Make what steps on a static cache share, which a compiled step would make anew each time."""
    kept = run.kept
    if kept is None or not takes_masks_only(kept, run.attachment):
        return
    if is_static(run.cache, kept.stages[0].first_later):
        make_fixed_columns(run.cache, kept)
    else:
        kept.plain_steps = kept.dense


def after_owner(
    owner: PreTrainedModel, args: Args, kwargs: Any, output: Any = None, *, attachment: Attachment
) -> None:
    """Stop recording the vision encoder; refuse an owner that did not hand its keyword arguments on.

    ``output`` as in `after_text`.
    """
    state: ForwardState | None = kwargs.get(STATE_KEY) if type(kwargs) is dict else None
    if state is None:
        return
    _end(state)
    if state.enabled and not state.reached_decoder and output is not None:
        refuse_unreached(owner, attachment)
