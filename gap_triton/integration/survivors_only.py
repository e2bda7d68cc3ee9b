"""Decoders that are handed the survivors alone, as if the prompt had never held what is dropped before the first layer.

That is how decoders are pruned whose layers can't be handed shorter inputs between two of them: recurrent layers,
convolutions, layers that choose what they attend to. Their own loop makes masks, rotary embeddings and whatever else of
the survivors, and the KV cache tells it what it holds. Position ids, sliding windows, chunks and distances are those
without pruning.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..arguments import CACHE, cache_of
from ..introspect import BY_PLACES, WITHOUT_ATTENTION
from ..kv_cache.kept_tokens import KeptRows, count_held, counts, store
from ..kv_cache.static_cache import fit
from ..later_layers.inputs import NOT_SHORTENED, mask_by_position, rows_by_position, take_survivors
from ..later_layers.masks import column_positions
from ..prefill.drop import drop_tokens
from ..prefill.prompt import position_ids_of
from ..state import DecoderRun, Prefill

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

IDS = "input_ids"
# Arguments of a decoder that are made anew, or that hold nothing per token.
NOT_TAKEN = (*NOT_SHORTENED, IDS, "inputs_embeds", "position_ids")


def hand_survivors(
    run: DecoderRun, text: PreTrainedModel, inputs: torch.Tensor, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Drop what is dropped before the decoder ``text``, and return its arguments with nothing but what is left.

    Args:
        run: The run of the decoder.
        text: The decoder.
        inputs: [B, Q] token ids or [B, Q, C] embeddings, as the decoder was given them.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: The KV cache is of a kind of its own.
    """
    cache, given = cache_of(kwargs), kwargs.get("attention_mask")
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"{CACHE} is a {type(cache).__name__}, which can't tell what each layer holds: expected a Cache of transformers"
        )
    run.given_mask = given if isinstance(given, dict) or getattr(given, "ndim", 0) == 4 else None
    kwargs = dict(kwargs)
    if run.prefill is not None:
        args, kwargs = _drop(run, run.prefill, text, inputs, args, kwargs)
    elif kwargs.get("position_ids") is None:
        # The decoder would count from what the cache holds.
        kwargs["position_ids"] = position_ids_of(None, run.rows.past, run.rows.queries, inputs.device)
    assert run.kept is not None
    kept = run.kept.stages[0]
    # Without a mask, and without a cache, ids with gaps are read as packed sequences.
    kwargs["attention_mask"] = _mask_of_held(run, kept, cache, inputs.device)
    if kwargs.get("cache_position") is not None:
        dropped = 0 if run.kept_before is None else run.kept_before.stages[0].dropped
        rows = run.rows.queries if run.survivors is None else run.survivors.index.shape[1]
        kwargs["cache_position"] = kwargs["cache_position"][:rows] - dropped
    count_held(cache, True)
    return args, kwargs


def _drop(
    run: DecoderRun, prefill: Prefill, text: PreTrainedModel, inputs: torch.Tensor, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    embeds: Any = kwargs.get("inputs_embeds")  # with what was merged
    by_ids = embeds is None
    if by_ids:
        embeds = text.get_input_embeddings()(inputs)
    drop = prefill.drops[0]
    dropped = drop_tokens(run, prefill, drop, embeds, {"position_ids": kwargs.get("position_ids")})
    run.kept, prefill.selection = dropped.kept, dropped.selection
    if prefill.past == 0:
        fit(cache_of(kwargs), {0: run.rows.queries - drop.length})
    rows, survivors = run.rows, run.survivors
    assert survivors is not None
    for name, value in kwargs.items():
        if name not in NOT_TAKEN:
            kwargs[name] = take_survivors(rows, survivors, name, value)
    kwargs["position_ids"] = take_survivors(rows, survivors, "position_ids", prefill.position_ids)
    if not by_ids:
        return (), {**kwargs, "inputs_embeds": dropped.hidden_states, IDS: None}
    ids = take_survivors(rows, survivors, IDS, inputs)
    return (ids, *args[1:]) if args else (), kwargs if args else {**kwargs, IDS: ids}


def _mask_of_held(run: DecoderRun, kept: KeptRows, cache: Cache | None, device: torch.device) -> torch.Tensor:
    """[B, N] int64, 1 at real tokens among all that the decoder's layers hold after this forward, or have room for."""
    held, past, real = kept.index.to(device) >= 0, run.rows.past, run.rows.real
    if isinstance(past, int):
        following = past + run.rows.queries - kept.covered
    else:
        assert cache is not None
        room = max(layer.max_cache_len for layer in cache.layers if counts(layer))
        following = room - held.shape[1]
    if following <= 0:
        return held.long()
    if real is None:
        return torch.nn.functional.pad(held, (0, following), value=True).long()
    columns = torch.arange(kept.covered, kept.covered + following, device=real.device)
    new = real[:, columns.clamp(max=real.shape[1] - 1)]
    return torch.cat([held, new.to(device)], dim=1).long()


def hand_positions(run: DecoderRun, args: Args, kwargs: Kwargs, index: int) -> tuple[Args, Kwargs] | None:
    """Return the arguments of layer ``index`` with what depends on how far apart tokens stand; None = as they are."""
    attachment = run.attachment
    kind = attachment.kinds[index]
    if kind in WITHOUT_ATTENTION or run.kept is None:
        return None
    window, chunk, mask = attachment.windows[index], attachment.chunks[index], run.given_mask
    if isinstance(mask, dict):
        # Filler sees everything in a mask of fewer rows, and an indexer looks at that. The decoder makes it another one.
        mask = None if kind == "indexed_attention" else mask.get(kind)
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 4 else None
    distance = kwargs.get("relative_distance")
    reach, past = window or chunk, run.rows.past
    masks = mask is not None or (
        reach is not None and not (isinstance(past, int) and past + run.rows.queries <= reach)
    )
    if not masks and distance is None and kind not in BY_PLACES:
        return None
    kept, cache = run.kept.stages[0], cache_of(kwargs)
    cache_layer = None if cache is None or index >= len(cache.layers) else cache.layers[index]
    hidden_states = args[0] if args else kwargs["hidden_states"]
    rows = run.rows.queries if run.survivors is None else run.survivors.index.shape[1]
    kwargs = dict(kwargs)
    if masks:
        allowed = run.compute_once(
            ("mask", kind),
            lambda: mask_by_position(run, kept, mask, cache_layer, rows, hidden_states.device, window, chunk),
        )
        kwargs["attention_mask"] = _as_given(allowed, kwargs.get("attention_mask"))
    if kind in BY_PLACES:
        kwargs["position_ids"] = run.compute_once(
            ("places", kind), lambda: _places(cache_layer, rows, hidden_states.device)
        )
    if distance is not None:
        kwargs["relative_distance"] = run.compute_once(
            ("distance", kind), lambda: _distances(run, kept, cache_layer, rows)
        )
    return args, kwargs


def _as_given(mask: torch.Tensor, own: Any) -> torch.Tensor:
    """``mask``, bool or additive as the decoder's ``own``."""
    if mask.dtype != torch.bool or not isinstance(own, torch.Tensor) or own.dtype == torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=own.dtype).masked_fill_(~mask, torch.finfo(own.dtype).min)


def _places(cache_layer: Any | None, rows: int, device: torch.device) -> torch.Tensor:
    """[1, L] int64, where the new rows of a layer stand in its cache, which holds survivors only."""
    held = 0 if cache_layer is None else cache_layer.get_seq_length()
    return (torch.arange(rows, device=device) + held)[None]


def _distances(run: DecoderRun, kept: KeptRows, cache_layer: Any | None, rows: int) -> torch.Tensor:
    """[B, 1, L, N] int64, how many original positions each column stands before each row."""
    columns = column_positions(kept, cache_layer, rows)
    positions = rows_by_position(run, rows, columns) + run.rows.past
    return positions[:, None, :, None] - columns[:, None, None, :]


def finish(run: DecoderRun, cache: Cache | None, output: Any) -> None:
    """Record on the KV cache what it holds, which a decoder may have made by itself; nothing to record if it failed.

    Args:
        run: The run of the decoder.
        cache: The KV cache that it was given.
        output: What it returned; None if it failed.
    """
    count_held(cache, False)
    if output is None or run.prefill is None or run.kept is None:
        return
    values = output if isinstance(output, tuple) else output.values()
    store(next((value for value in values if isinstance(value, Cache)), cache), run.kept)
