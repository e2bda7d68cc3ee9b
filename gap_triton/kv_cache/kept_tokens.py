"""What a pruned KV cache stands for: reading, changing and storing `KeptTokens`, and refusing what can't go on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..arguments import CACHE
from ..config import BEFORE_THE_DECODER, GapConfig
from ..state import Drop, ForwardState, KeptRows, KeptTokens

CACHE_ATTRIBUTE = "_gap_kept_tokens"
UNFINISHED_ATTRIBUTE = "_gap_unfinished"  # of a cache that a pruned forward has begun to fill
LENGTH_ATTRIBUTE = "_gap_full_length"  # of a cache that `gap_triton.static_cache` made


def store(cache: Any | None, kept: KeptTokens) -> None:
    """Let the cache carry ``kept`` to the next forward; nothing to do without a cache."""
    if cache is not None:
        setattr(cache, CACHE_ATTRIBUTE, kept)


def kept_tokens_of(cache: Any | None, batch: int) -> KeptTokens | None:
    """What the cache's later layers hold, None where nothing was dropped from it.

    Raises:
        ValueError: The cache was pruned for another batch size, or by a forward that failed on the way.
    """
    _refuse_unfinished_cache(cache)
    kept: KeptTokens | None = getattr(cache, CACHE_ATTRIBUTE, None)
    if kept is not None and kept.stages[0].index.shape[0] != batch:
        raise ValueError(
            f"{CACHE} was pruned for a batch of {kept.stages[0].index.shape[0]} and is continued with a batch of "
            f"{batch}: expand the inputs before the prompt is run, or the cache with its own methods "
            "(batch_repeat_interleave, batch_select_indices, reorder_cache)"
        )
    return kept


def begin(state: ForwardState, cache: Any | None) -> None:
    """Mark the cache of a forward that drops, or adds several rows to a pruned cache, until `settle` takes the mark away.

    An exception in between leaves it.
    """
    if cache is not None and (state.drops or state.queries > 1):
        state.cache = cache
        setattr(cache, UNFINISHED_ATTRIBUTE, True)


def settle(cache: Any | None) -> None:
    """Take away what `begin` left on a cache."""
    if cache is not None:
        delattr(cache, UNFINISHED_ATTRIBUTE)


def original_length(
    cache: Any | None, kept: KeptTokens | None, cache_position: torch.Tensor | None, queries: int
) -> int | torch.Tensor:
    """Number of tokens that the cache stands for, dropped ones included.

    Args:
        cache: The KV cache of the running forward.
        kept: What its later layers hold.
        cache_position: [Q], original positions of the new rows, where this release of transformers passes them.
        queries: Q, the number of new rows.

    Returns:
        An int; for one new row and a static cache an int64 tensor of no dimension, so that a decode step reads nothing
        from the device.

    Raises:
        ValueError: Earlier and later layers disagree, because the cache was changed behind our back.
    """
    if cache is None:
        return 0
    if kept is None:
        return int(cache.get_seq_length())
    first = kept.stages[0].layer
    if is_static(cache, first + 1):
        length = _static_length(cache, kept)
        if not isinstance(length, int) and cache_position is not None:
            length = cache_position[
                0
            ]  # where it is passed, static layers guess their length from their contents
        return length if queries == 1 else int(length)
    held = [int(cache.layers[stage.layer + 1].get_seq_length()) for stage in kept.stages]
    lengths = [length + stage.dropped for length, stage in zip(held, kept.stages, strict=True)]
    if first != BEFORE_THE_DECODER:
        lengths.insert(0, int(cache.layers[0].get_seq_length()))
    too_short = any(length < stage.index.shape[1] for length, stage in zip(held, kept.stages, strict=True))
    if too_short or len(set(lengths)) > 1:
        found = ", ".join(
            f"layer {stage.layer + 1} {length}" for length, stage in zip(held, kept.stages, strict=True)
        )
        raise ValueError(
            f"{CACHE} was changed behind its own methods after it was pruned: {found} tokens are held, which with "
            f"what was dropped stand for {' and '.join(map(str, lengths))}, layer 0 first. Use {CACHE}.crop(...), "
            "which knows what was dropped, or start a new cache"
        )
    return lengths[0]


def is_static(cache: Any | None, layer: int) -> bool:
    """Whether ``cache`` keeps decoder layer ``layer`` in a buffer of fixed size."""
    return (
        cache is not None
        and layer < len(cache.layers)
        and getattr(cache.layers[layer], "is_compileable", False)
    )


def _static_length(cache: Any, kept: KeptTokens) -> int | torch.Tensor:
    length: int | torch.Tensor = 0
    for index, layer in enumerate(cache.layers):
        # A new tensor: the layer's own is counted up in place while the forward runs.
        record = kept.at(index)
        length = layer.get_seq_length() + (0 if record is None else record.dropped)
        if isinstance(length, int):  # sliding layers count on the host
            break
    return length


def _refuse_unfinished_cache(cache: Any | None) -> None:
    if getattr(cache, UNFINISHED_ATTRIBUTE, False):
        raise ValueError(
            f"{CACHE} is left from a forward that failed before its last layer, so some layers hold its tokens and others "
            "don't: start a new cache, or reset() this one"
        )


def refuse_pruned_cache(cache: Any | None) -> None:
    """Raise ValueError if ``cache`` was pruned: called where nothing will be done about what it lacks."""
    _refuse_unfinished_cache(cache)
    if getattr(cache, CACHE_ATTRIBUTE, None) is not None:
        raise ValueError(
            f"{CACHE} was pruned, and goes on in a model that does not prune now (training mode, another attention "
            "implementation, or a call of the decoder by itself): go on with the model that pruned it, or start a new cache"
        )


def refuse_continuation(kept: KeptTokens, config: GapConfig | None, queries: int, sees_image: bool) -> None:
    """Refuse a block of ``queries`` > 1 tokens that the cache can't take.

    Args:
        kept: What the cache's later layers hold.
        config: How this block is pruned, None where it is not.
        queries: Number of tokens in the block.
        sees_image: There are visual tokens among them.

    Raises:
        ValueError: The pruned prompt was not complete, and its choice depends on what follows; or the cache was pruned after
            another layer, by another id rule, or before the decoder.
    """
    if not kept.settled and (sees_image or not kept.whole):
        raise ValueError(
            f"{queries} more prompt tokens follow a pruned prompt with no generated token in between: the tokens were "
            "chosen by a prompt that was not complete. Chunked prefill can't be combined with pruning: pass the whole "
            "prompt in one forward (prefill_chunk_size=None), or keep=1.0. Only text may follow a first part that holds all "
            "images and ends in text, where no score looks at text (cls, received, key_norm, random, spatial)"
        )
    if config is None:
        return
    layers = tuple(stage.layer for stage in config.stages)
    if layers != kept.layers:
        raise ValueError(
            f"GapConfig prunes at layers {_listed(layers)}, but this cache was pruned at layers {_listed(kept.layers)}: go "
            "on with those, or start a new cache"
        )
    if config.ids != kept.ids:
        raise ValueError(
            f"GapConfig.ids={config.ids!r}, but this cache was pruned with {kept.ids!r}: go on with that rule, or start a "
            "new cache"
        )


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def extend(state: ForwardState, drop: Drop, positions: torch.Tensor) -> KeptRows:
    """What the layers after a stage hold once they have taken the rows of a prompt that is pruned.

    Args:
        state: The running forward.
        drop: The stage.
        positions: [B, L] int64, original positions of the surviving rows, -1 = filler. Drafts, which are the last of them,
            are not recorded: like all that follows a prompt, they are held one to one.

    Returns:
        The extension of the stage's record in ``state.before``, or a new one where nothing had been dropped.
    """
    assert isinstance(state.past, int)
    before = None if state.before is None else state.before.stages[state.done]
    covered = 0 if before is None else before.covered
    between = torch.arange(covered, state.past, device=positions.device).expand(positions.shape[0], -1)
    new = torch.cat([between, positions[:, : positions.shape[1] - state.drafts]], dim=1)
    if state.real is not None:
        new = torch.where((new >= 0) & state.real.to(new.device).gather(1, new.clamp(min=0)), new, -1)
    return KeptRows(
        layer=drop.stage.layer,
        index=new if before is None else torch.cat([before.index, new], dim=1),
        covered=state.past + state.queries - state.drafts,
        # Of earlier tokens only the device knows whether they are padding.
        dense=drop.dense and before is None and state.past == 0,
        id_shift=None if before is None else before.id_shift,
    )


# --------------------------------------------------------------------------------------------- methods of a cache
def follow_cache_methods() -> None:
    """Let the methods of transformers' `Cache` that change its samples or its length change `KeptTokens` with it.

    Each is wrapped once, for all caches; a cache that was never pruned goes straight to the method.
    """
    for name, follow in {
        "reorder_cache": _then(_select),
        "batch_select_indices": _then(_select),
        "batch_repeat_interleave": _then(_repeat),
        "reset": _then(lambda kept: None),
        "crop": _crop,
    }.items():
        method = getattr(Cache, name)
        if not hasattr(method, "_gap_follows"):
            setattr(Cache, name, _following(method, follow))
    # Methods that answer for one layer, which is an argument at this place.
    for name, place, unpruned in (
        ("get_seq_length", 0, _unpruned_length),
        ("get_mask_sizes", 1, _unpruned_sizes),
    ):
        method = getattr(Cache, name)
        if not hasattr(method, "_gap_follows"):
            setattr(Cache, name, _answering(method, place, unpruned))


Follow = Callable[..., KeptTokens | None]


def _following(method: Callable[..., Any], follow: Follow) -> Callable[..., Any]:
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


def _answering(
    method: Callable[..., Any], place: int, unpruned: Callable[[Cache, int, Any], Any]
) -> Callable[..., Any]:
    """``method``, with its answer as if nothing were ever dropped: models and `generate` count and size masks by it."""

    @functools.wraps(method)
    def wrapped(self: Cache, *args: Any, **kwargs: Any) -> Any:
        answer = method(self, *args, **kwargs)
        layer = args[place] if len(args) > place else kwargs.get("layer_idx", 0)
        return unpruned(self, layer, answer)

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    return wrapped


def _unpruned_length(cache: Cache, layer: int, length: Any) -> Any:
    """Only where even the first layer lacks tokens; elsewhere a layer is asked for what it holds."""
    kept: KeptTokens | None = getattr(cache, CACHE_ATTRIBUTE, None)
    if kept is None or kept.stages[0].layer != BEFORE_THE_DECODER:
        return length
    record = kept.at(layer)
    assert record is not None
    return length + record.dropped


def _unpruned_sizes(cache: Cache, layer: int, sizes: tuple[Any, int]) -> tuple[Any, int]:
    full = getattr(cache, LENGTH_ATTRIBUTE, None)
    if full is not None and not getattr(cache.layers[layer], "is_sliding", False):
        return full, sizes[1]  # also before a prompt that finds buffers as short as the last one left them
    return _unpruned_length(cache, layer, sizes[0]), sizes[1]


def _then(change: Follow) -> Follow:
    """The method itself, then ``change`` of the note by the same arguments."""

    def follow(cache: Cache, kept: KeptTokens, method: Callable[..., Any], *args: Any) -> KeptTokens | None:
        method(*args)
        return change(kept, *args)

    return follow


def _select(kept: KeptTokens, samples: Any) -> KeptTokens:
    def select(record: KeptRows) -> KeptRows:
        chosen = samples.to(record.index.device) if isinstance(samples, torch.Tensor) else samples
        shift = None if record.id_shift is None else record.id_shift[..., chosen]
        return replace(record, index=record.index[chosen], id_shift=shift)

    return kept.map(select)


def _repeat(kept: KeptTokens, repeats: int) -> KeptTokens:
    def repeat(record: KeptRows) -> KeptRows:
        shift = None if record.id_shift is None else record.id_shift.repeat_interleave(repeats, dim=-1)
        return replace(record, index=record.index.repeat_interleave(repeats, dim=0), id_shift=shift)

    return kept.map(repeat)


def _crop(cache: Cache, kept: KeptTokens, method: Callable[..., Any], amount: int) -> KeptTokens | None:
    """Crop layers that hold everything as asked, and others to what they hold of the positions that are left.

    Raises:
        ValueError: The crop reaches into a prompt whose tokens were renumbered.
    """
    length = cache.layers[kept.stages[0].layer + 1].get_seq_length() + kept.stages[0].dropped
    left = _cropped(int(length), amount)
    if left < kept.covered and any(record.id_shift is not None for record in kept.stages):
        raise ValueError(
            f"{CACHE}.crop({amount}) reaches into a pruned prompt whose ids were renumbered "
            f"(ids={kept.ids!r}): crop generated tokens only, or prune with ids='kept'"
        )
    # Without the generated tokens the prompt is as complete as it was, and another one may be on its way.
    after = replace(kept, settled=left > kept.covered)
    if left < kept.covered:
        after = after.map(functools.partial(_cut, left=left))
    for number, layer in enumerate(cache.layers):
        record = after.at(number)
        if record is None:
            layer.crop(amount)
            continue
        surplus = int(layer.get_seq_length()) - record.index.shape[1] - (left - record.covered)
        if surplus:
            layer.crop(-surplus)
        elif amount == 0:  # shrinks a sliding window that was recording its past
            layer.crop(0)
    return after if left else None


def _cut(record: KeptRows, left: int) -> KeptRows:
    """The record of the first ``left`` original positions."""
    # A column that only some samples lose stays, and nobody may attend to it there.
    index = torch.where(record.index < left, record.index, -1)
    number = torch.arange(1, index.shape[1] + 1, device=index.device)
    columns = int(torch.where((index >= 0).any(dim=0), number, 0).amax())
    return replace(record, index=index[:, :columns], covered=left, dense=False)


def _cropped(length: int, amount: int) -> int:
    """How many of ``length`` tokens `Cache.crop` leaves: by number or to a length, as this release has it."""
    layer = DynamicLayer()
    rows = torch.empty(1, 1, length, 1)
    layer.update(rows, rows)
    layer.crop(amount)
    return 0 if layer.keys is None else layer.keys.shape[-2]
