"""One forward of a pruned model, as the hooks see it.

A decoder's loop keeps hidden states, rotary embeddings, masks and ids in local variables that nothing outside can
rebind, so *every* layer after the pruning layer has a pre-hook that hands it the shortened ones. Dropping happens in
the pre-hook of the first later layer, which leaves all that a model adds after the pruning layer in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gap_kernels import PrunedTokens, prune_by_score, prune_tokens, visual_importance
from transformers import PreTrainedModel
from transformers.utils import logging

from .attention import NAME, STATE_KEY
from .config import BEFORE_THE_DECODER
from .ids import compact, score_order
from .masks import causal_mask, column_positions, take_from_mask
from .prompt import find_visual_tokens, make_plan
from .selection import Selection
from .state import Attachment, ForwardState, KeptTokens, Plan, remember_selection

logger = logging.get_logger(__name__)

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

CACHE_ATTRIBUTE = "_gap_kept_tokens"


# --------------------------------------------------------------------------------------------- hooks
def before_owner(
    owner: PreTrainedModel, args: Args, kwargs: Kwargs, *, attachment: Attachment
) -> tuple[Args, Kwargs]:
    """Start the state of this forward where ``input_ids`` can be seen."""
    state = ForwardState(config=attachment.config, attachment=attachment, visual=None)
    state.enabled = attachment.text.config._attn_implementation == NAME and not owner.training
    if owner.training:
        logger.warning_once(
            "gap_triton prunes at inference only: in training mode the model runs dense and unpruned. Call model.eval() "
            "to prune."
        )
    if state.enabled:
        input_ids = args[0] if args else kwargs.get("input_ids")
        state.visual = find_visual_tokens(owner, input_ids, kwargs.get("inputs_embeds"))
    return args, {**kwargs, STATE_KEY: state}


def before_text(text: PreTrainedModel, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """Decide what this forward drops and what the cache already lacks."""
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None or not state.enabled:
        return None
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    batch, queries = inputs.shape[:2]
    cache = kwargs.get("past_key_values")
    state.kept = _kept_tokens_of(cache, batch)
    state.past = _original_length(cache, state.kept)
    mask = kwargs.get("attention_mask")
    state.padding_mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    if state.visual is not None:
        _refuse_a_split_prompt(state, queries)
        state.plan = make_plan(state.visual, _padding_of(mask, state, queries), state.config)
        if state.plan is not None:
            check_layer(state.config.layer, len(text.layers))
    if state.kept is None:
        return None
    if state.plan is not None and state.kept.layer != state.config.layer:
        raise ValueError(
            f"GapConfig.layer={state.config.layer}, but this cache was pruned after layer {state.kept.layer}: "
            "go on with that layer, or start a new cache"
        )
    if queries == 1:
        state.kept.settled = True
    elif state.plan is None:
        # A turn that drops nothing: the later layers hold all of its rows.
        _take_over(state, None, queries)
        setattr(cache, CACHE_ATTRIBUTE, state.kept)
    if kwargs.get("position_ids") is None and state.kept.layer == BEFORE_THE_DECODER:
        # The model would count from the shortened cache of its first layer.
        positions = state.past + torch.arange(queries, device=inputs.device)
        return args, {**kwargs, "position_ids": positions[None]}
    return None


def before_layer(layer: Any, args: Args, kwargs: Kwargs, *, index: int) -> tuple[Args, Kwargs] | None:
    """Hand a later layer its shortened inputs; the first of them drops."""
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None or not state.enabled or (state.plan is None and state.kept is None):
        return None
    pruning_layer = state.config.layer if state.plan is not None else state.kept.layer  # type: ignore[union-attr]
    if index <= pruning_layer:
        return None
    kwargs = dict(kwargs)
    if state.plan is not None:
        hidden_states = args[0] if args else kwargs.pop("hidden_states")
        if index == pruning_layer + 1:
            hidden_states = _drop(state, state.plan, hidden_states, kwargs)
        args = (hidden_states, *args[1:])
    _shorten(state, args[0] if args else kwargs["hidden_states"], kwargs, index)
    return args, kwargs


def after_text(text: PreTrainedModel, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Put the surviving rows back where they stood, so that logits and labels keep the shape of the prompt."""
    state: ForwardState | None = kwargs.get(STATE_KEY)
    if state is None or state.plan is None or state.survivors is None:
        return None
    hidden_states = output[0]
    batch, _, channels = hidden_states.shape
    survivors = state.survivors.to(hidden_states.device)
    # One more row at the end takes the filler and is cut off again.
    full = hidden_states.new_zeros(batch, state.plan.visual.shape[1] + 1, channels)
    target = torch.where(survivors < 0, full.shape[1] - 1, survivors)
    full = full.scatter(1, target[..., None].expand_as(hidden_states), hidden_states)[:, :-1]
    if isinstance(output, tuple):
        return (full, *output[1:])
    output.last_hidden_state = full
    return output


# --------------------------------------------------------------------------------------------- the cache
def _kept_tokens_of(cache: Any | None, batch: int) -> KeptTokens | None:
    kept: KeptTokens | None = getattr(cache, CACHE_ATTRIBUTE, None)
    if kept is None or cache is None:
        return None
    if int(cache.get_seq_length(kept.layer + 1)) == 0:  # the cache was reset
        delattr(cache, CACHE_ATTRIBUTE)
        return None
    if kept.index.shape[0] != batch:
        raise ValueError(
            f"past_key_values was pruned for a batch of {kept.index.shape[0]} and is continued with a batch of {batch}: "
            "expand the inputs before the prompt is run, not the cache after it"
        )
    return kept


def _original_length(cache: Any | None, kept: KeptTokens | None) -> int:
    """Number of tokens that the cache stands for, dropped ones included."""
    if cache is None:
        return 0
    if kept is None:
        return int(cache.get_seq_length())
    length = kept.original_length(int(cache.get_seq_length(kept.layer + 1)))
    if kept.layer != BEFORE_THE_DECODER and length != int(cache.get_seq_length(0)):
        raise ValueError(
            f"past_key_values holds {int(cache.get_seq_length(0))} tokens in layer 0 but stands for {length} in layer "
            f"{kept.layer + 1}: it was cropped to an absolute length after pruning; crop by a number of tokens, or start a "
            "new cache"
        )
    return length


def _refuse_a_split_prompt(state: ForwardState, queries: int) -> None:
    kept = state.kept
    if kept is None:
        return
    if not kept.settled:
        raise ValueError(
            f"{queries} more prompt tokens follow a pruned prompt with no generated token in between: the tokens were "
            "chosen by a prompt that was not complete. Chunked prefill and assisted decoding can't be combined with "
            "pruning: pass the whole prompt in one forward (prefill_chunk_size=None), or keep=1.0"
        )
    if kept.layer == BEFORE_THE_DECODER:
        raise ValueError(
            "GapConfig.layer=-1 prunes before the decoder, and then a cache can't take another turn: use a layer >= 0, or "
            "start a new cache with the whole conversation"
        )


def _padding_of(mask: Any, state: ForwardState, queries: int) -> torch.Tensor | None:
    """[B, Q] of the new rows, True = real; None where nothing is known to be padding."""
    if state.padding_mask is not None:
        return state.padding_mask
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        # A ready-made mask shows padding on its diagonal only: a padded row may not attend to itself.
        own = mask[:, 0, :, state.past : state.past + queries].diagonal(dim1=1, dim2=2)
        own = own if own.dtype == torch.bool else own == 0
        return own.expand(state.visual.shape[0], -1)  # type: ignore[union-attr]
    return None


def _take_over(state: ForwardState, survivors: torch.Tensor | None, queries: int, dense: bool = True) -> None:
    """Extend what the later layers hold by this forward's rows: ``survivors``, or all of them."""
    past, kept = state.past, state.kept
    device = kept.index.device if kept is not None else survivors.device  # type: ignore[union-attr]
    real = None
    if state.padding_mask is not None and state.padding_mask.shape[1] == past + queries:
        real = state.padding_mask.to(device) != 0  # [B, past + Q]

    def positions(start: int, stop: int) -> torch.Tensor:
        column = torch.arange(start, stop, device=device)[None].expand(batch, -1)
        return column if real is None else torch.where(real[:, start:stop], column, -1)

    batch = kept.index.shape[0] if kept is not None else survivors.shape[0]  # type: ignore[union-attr]
    parts = [positions(0, past)] if kept is None else [kept.index, positions(kept.covered, past)]
    if survivors is None:
        parts.append(positions(past, past + queries))
    else:
        alive = survivors >= 0
        if state.plan is not None:
            alive = alive & state.plan.real.gather(1, survivors.clamp(min=0))
        parts.append(torch.where(alive, survivors + past, -1))
    index = torch.cat(parts, dim=1)
    # Only a prompt on an empty cache is known to be dense without asking the device.
    dense = dense and kept is None and past == 0
    layer = state.config.layer if state.plan is not None else kept.layer  # type: ignore[union-attr]
    state.kept = KeptTokens(layer, index, past + queries, dense, None if kept is None else kept.id_shift)


# --------------------------------------------------------------------------------------------- dropping
def _drop(state: ForwardState, plan: Plan, hidden_states: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
    """Choose, gather and take note; returns the surviving rows of ``hidden_states``, [B, L, C]."""
    batch, queries, _ = hidden_states.shape
    cos, sin = (x.expand(batch, -1, -1) for x in kwargs["position_embeddings"])
    position_ids = kwargs["position_ids"].expand(batch, -1)
    pruned = _score_and_prune(state, plan, hidden_states, cos, sin, position_ids)
    kept_before, cache = state.kept, kwargs.get("past_key_values")
    _take_over(state, pruned.index, queries, plan.dense)
    kept = state.kept
    assert kept is not None
    if cache is not None:
        setattr(cache, CACHE_ATTRIBUTE, kept)

    state.slots = state.survivors = pruned.index
    new_ids, new_hidden = pruned.position_ids, pruned.hidden_states
    if state.config.ids == "permuted":
        row_score = hidden_states.new_zeros(batch, queries + 1, dtype=pruned.scores.dtype)
        slots = torch.where(plan.visual_index < 0, queries, plan.visual_index)
        row_score = row_score.scatter(1, slots, pruned.scores)[:, :-1]
        state.survivors = score_order(pruned.index, plan.visual, row_score)
        rows = state.survivors.clamp(min=0)
        new_hidden = hidden_states.gather(1, rows[..., None].expand_as(new_hidden))
    if state.config.ids != "kept":
        shift = None if kept_before is None else kept_before.id_shift
        new_ids, kept.id_shift = compact(position_ids, pruned.index, plan.real, shift)
        state.memo["rotary"] = state.attachment.text.rotary_emb(new_hidden, new_ids)
    else:
        state.memo["rotary"] = (pruned.cos, pruned.sin)
    state.memo["position_ids"] = new_ids
    selection = Selection(pruned.index, new_ids, plan.visual_index, pruned.scores, plan.visual)
    remember_selection(state.attachment, selection)
    state.query = state.key = None
    return new_hidden


def _score_and_prune(
    state: ForwardState,
    plan: Plan,
    hidden_states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
) -> PrunedTokens:
    tokens = (hidden_states, cos, sin, position_ids, plan.visual_index, plan.keep)
    if state.config.score == "random":
        generator = torch.Generator().manual_seed(state.config.seed)
        scores = torch.rand(plan.visual_index.shape, generator=generator).to(hidden_states.device)
        return prune_by_score(scores, *tokens, attention_mask=plan.real, length=plan.length)
    query, key = state.query, state.key
    if query is None or key is None:
        raise RuntimeError(
            f"layer {state.config.layer} ran without calling the attention function '{NAME}', so nothing was scored: set "
            'attn_implementation="gap_triton" for the text model'
        )
    key = key[:, :, : state.past + hidden_states.shape[1]]  # a static cache hands over its whole buffer
    columns = _real_columns(state, plan, key.shape[2])
    window = sliding_window(state.attachment.text.config, state.config.layer)
    if window is None or window >= key.shape[2]:
        return prune_tokens(
            query, key, *tokens, rows=plan.rows, attention_mask=columns, scale=state.scale, length=plan.length
        )
    # The scoring rows see the last `window` columns only, but a row outside the window is no padding.
    last = plan.rows.amax(dim=1, keepdim=True) + key.shape[2] - query.shape[2]
    seen = columns & (torch.arange(key.shape[2], device=columns.device) > last - window)
    scores = visual_importance(
        query, key, plan.visual_index, rows=plan.rows, attention_mask=seen, scale=state.scale
    )
    return prune_by_score(scores, *tokens, attention_mask=plan.real, length=plan.length)


def _real_columns(state: ForwardState, plan: Plan, columns: int) -> torch.Tensor:
    """[B, columns] bool: the key columns, earlier ones first, that are no padding."""
    batch, queries = plan.real.shape
    past = plan.real.new_ones(batch, columns - queries)
    if columns > queries and state.padding_mask is not None:
        past = state.padding_mask[:, -columns:-queries] != 0
    return torch.cat([past, plan.real], dim=1)


# --------------------------------------------------------------------------------------------- later layers
def _shorten(state: ForwardState, hidden_states: torch.Tensor, kwargs: Kwargs, index: int) -> None:
    """Replace mask, ids and rotary embeddings of one later layer, in ``kwargs``."""
    kept = state.kept
    assert kept is not None
    cache = kwargs.get("past_key_values")
    cache_layer = None if cache is None or index >= len(cache.layers) else cache.layers[index]
    window = sliding_window(state.attachment.text.config, index)
    mask = kwargs.get("attention_mask")
    # The memo holds on to the model's mask as well, so that its id can't be taken over by another tensor.
    _, kwargs["attention_mask"] = state.once(
        ("mask", id(mask), window),
        lambda: (mask, _later_mask(state, kept, mask, cache_layer, hidden_states, window)),
    )
    if state.plan is not None:
        kwargs["position_embeddings"] = state.memo["rotary"]
        kwargs["position_ids"] = state.memo["position_ids"]
    elif kept.id_shift is not None:
        ids = state.once("position_ids", _shifted_ids(kwargs["position_ids"], kept.id_shift))
        kwargs["position_ids"] = ids
        kwargs["position_embeddings"] = state.once(
            "rotary", lambda: state.attachment.text.rotary_emb(hidden_states, ids)
        )
    if kwargs.get("cache_position") is not None and cache_layer is not None:
        # transformers before 5.20 tells static caches where to write; here the layer's own length says it.
        start = int(cache_layer.get_seq_length())
        kwargs["cache_position"] = start + torch.arange(hidden_states.shape[1], device=hidden_states.device)


def _shifted_ids(position_ids: torch.Tensor, id_shift: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: position_ids - id_shift[:, None]


def _later_mask(
    state: ForwardState,
    kept: KeptTokens,
    mask: torch.Tensor | None,
    cache_layer: Any | None,
    hidden_states: torch.Tensor,
    window: int | None,
) -> torch.Tensor | None:
    """Mask of a later layer; None where plain causal attention, or attention to everything, is right."""
    rows = hidden_states.shape[1]
    device = hidden_states.device
    if state.plan is not None:
        if mask is None and kept.dense:
            return None
        assert state.slots is not None
        columns = column_positions(kept, cache_layer, rows)
        if mask is None:
            positions = torch.where(state.slots < 0, -1, state.slots + state.past)
            return causal_mask(positions, columns, window).to(device)
        return take_from_mask(mask, state.slots, columns, kept.covered)
    total = state.past + rows
    static = cache_layer is not None and getattr(cache_layer, "is_compileable", False)
    if rows == 1 and kept.dense and not static and (window is None or total <= window):
        return None
    columns = column_positions(kept, cache_layer, rows)
    positions = state.past + torch.arange(rows, device=columns.device)
    return causal_mask(positions[None], columns, window).to(device)


def sliding_window(config: Any, index: int) -> int | None:
    """Sliding window of decoder layer ``index`` in tokens, None where it attends to everything."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding" not in layer_types[index]:
        return None
    return int(window)


def check_layer(layer: int, layers: int) -> None:
    """Raise ValueError unless at least one of the decoder's ``layers`` layers follows the pruning layer."""
    if layer > layers - 2:
        raise ValueError(
            f"GapConfig.layer={layer}: this model's decoder has {layers} layers; expected -1 to {layers - 2}, so that at "
            "least one layer follows the pruning layer"
        )
