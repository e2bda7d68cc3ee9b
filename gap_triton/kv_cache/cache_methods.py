"""Methods of transformers' `Cache` that change its samples or its length, and what was kept with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..arguments import CACHE
from ..config import BEFORE_THE_DECODER
from .kept_tokens import (
    CACHE_ATTRIBUTE,
    HELD_ATTRIBUTE,
    LENGTH_ATTRIBUTE,
    UNFINISHED_ATTRIBUTE,
    KeptRows,
    KeptTokens,
    counts,
    layer_that_counts,
    store,
)


# --------------------------------------------------------------------------------------------- methods of a cache
def follow_cache_methods() -> None:
    """Let the methods of transformers' `Cache` that change its samples or its length change `KeptTokens` with it.

    Each is wrapped once, for all caches; a cache that was never pruned goes straight to the method.
    """
    for name, follow in {
        "reorder_cache": _method_then(_select),
        "batch_select_indices": _method_then(_select),
        "batch_repeat_interleave": _method_then(_repeat),
        "reset": _method_then(lambda kept: None),
        "crop": _crop,
    }.items():
        method = getattr(Cache, name)
        if not hasattr(method, "_gap_follows"):
            setattr(Cache, name, _wrap_change(method, follow))
    # Methods that answer for one layer, which is an argument at this position.
    for name, argument, unpruned in (
        ("get_seq_length", 0, _unpruned_length),
        ("get_mask_sizes", 1, _unpruned_sizes),
    ):
        method = getattr(Cache, name)
        if not hasattr(method, "_gap_follows"):
            setattr(Cache, name, _wrap_query(method, argument, unpruned))


Change = Callable[..., KeptTokens | None]


def _wrap_change(method: Callable[..., Any], follow: Change) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Cache, *args: Any, **kwargs: Any) -> Any:
        kept: KeptTokens | None = getattr(self, CACHE_ATTRIBUTE, None)
        if kept is None:
            result = method(self, *args, **kwargs)
        else:
            result = None
            kept = follow(self, kept, functools.partial(method, self), *args, *kwargs.values())
            if kept is None:
                delattr(self, CACHE_ATTRIBUTE)
            else:
                store(self, kept)
        # Some releases' reset() leaves dynamic layers as long as they were.
        if getattr(self, UNFINISHED_ATTRIBUTE, False) and not int(self.get_seq_length()):
            delattr(self, UNFINISHED_ATTRIBUTE)
        return result

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    return wrapped


def _wrap_query(
    method: Callable[..., Any], argument: int, unpruned: Callable[[Cache, int, Any], Any]
) -> Callable[..., Any]:
    """``method``, with its answer as if nothing were ever dropped: models and `generate` count and size masks by it."""

    @functools.wraps(method)
    def wrapped(self: Cache, *args: Any, **kwargs: Any) -> Any:
        answer = method(self, *args, **kwargs)
        layer = args[argument] if len(args) > argument else kwargs.get("layer_idx", 0)
        return unpruned(self, layer, answer)

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    return wrapped


def _unpruned_length(cache: Cache, layer: int, length: Any) -> Any:
    """``length`` with what was dropped, where even the first layer lacks tokens; elsewhere what the layer holds."""
    kept: KeptTokens | None = getattr(cache, CACHE_ATTRIBUTE, None)
    if kept is None or kept.stages[0].layer != BEFORE_THE_DECODER or getattr(cache, HELD_ATTRIBUTE, False):
        return length
    return length + kept.dropped_at(layer)


def _unpruned_sizes(cache: Cache, layer: int, sizes: tuple[Any, int]) -> tuple[Any, int]:
    if getattr(cache, HELD_ATTRIBUTE, False):
        return sizes
    full = getattr(cache, LENGTH_ATTRIBUTE, None)
    if full is not None and not getattr(cache.layers[layer], "is_sliding", False):
        # Also before a prompt: its buffers may still be as short as the last one made them.
        return full, sizes[1]
    return _unpruned_length(cache, layer, sizes[0]), sizes[1]


def _method_then(change: Change) -> Change:
    """The method itself, then ``change`` of the record by the same arguments."""

    def follow(cache: Cache, kept: KeptTokens, method: Callable[..., Any], *args: Any) -> KeptTokens | None:
        method(*args)
        return change(kept, *args)

    return follow


def _select(kept: KeptTokens, samples: Any) -> KeptTokens:
    def select(record: KeptRows) -> KeptRows:
        indices = samples.to(record.index.device) if isinstance(samples, torch.Tensor) else samples
        shift = None if record.id_shift is None else record.id_shift[..., indices]
        return replace(record, index=record.index[indices], id_shift=shift)

    return kept.map(select)


def _repeat(kept: KeptTokens, repeats: int) -> KeptTokens:
    def repeat(record: KeptRows) -> KeptRows:
        shift = None if record.id_shift is None else record.id_shift.repeat_interleave(repeats, dim=-1)
        return replace(record, index=record.index.repeat_interleave(repeats, dim=0), id_shift=shift)

    return kept.map(repeat)


def _crop(cache: Cache, kept: KeptTokens, method: Callable[..., Any], amount: int) -> KeptTokens | None:
    """Crop layers that hold everything by ``amount``, and others to what they hold of the remaining positions.

    Raises:
        ValueError: The crop reaches into a prompt whose tokens were renumbered.
    """
    stage = kept.stages[0]
    first = layer_that_counts(cache, stage.first_later)
    length = cache.get_seq_length() if first is None else first.get_seq_length() + stage.dropped
    remaining = _length_after_crop(int(length), amount)
    if remaining < kept.covered and kept.renumbered:
        raise ValueError(
            f"{CACHE}.crop({amount}) reaches into a pruned prompt whose ids were renumbered "
            f"(ids={kept.ids!r}): crop generated tokens only, or prune with ids='kept'"
        )
    # Without the generated tokens the prompt is as complete as it was, and another one may be on its way.
    after = replace(kept, complete=remaining > kept.covered)
    if remaining < kept.covered:
        after = after.map(functools.partial(_crop_record, remaining=remaining))
    for number, layer in enumerate(cache.layers):
        record = after.at(number)
        if record is None:
            layer.crop(amount)
            continue
        if not counts(layer) or not layer.is_initialized:
            # A state, or what a layer holds that attends to another one's keys: they know how much to take back only.
            layer.crop(remaining - int(length))
            continue
        surplus = int(layer.get_seq_length()) - record.index.shape[1] - (remaining - record.covered)
        if surplus:
            layer.crop(-surplus)
        elif amount == 0:  # shrinks a sliding window that was recording its past
            layer.crop(0)
    return after if remaining else None


def _crop_record(record: KeptRows, remaining: int) -> KeptRows:
    """The record of the first ``remaining`` original positions."""
    # A column that only some samples lose stays, and no row may attend to it there.
    index = torch.where(record.index < remaining, record.index, -1)
    number = torch.arange(1, index.shape[1] + 1, device=index.device)
    columns = int(torch.where((index >= 0).any(dim=0), number, 0).amax())
    return replace(record, index=index[:, :columns], covered=remaining, dense=False)


def _length_after_crop(length: int, amount: int) -> int:
    """How many of ``length`` tokens `Cache.crop` leaves: by number or to a length, as this release has it."""
    layer = DynamicLayer()
    rows = torch.empty(1, 1, length, 1)
    layer.update(rows, rows)
    layer.crop(amount)
    return 0 if layer.keys is None else layer.keys.shape[-2]
