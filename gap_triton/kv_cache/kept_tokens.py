"""What a pruned KV cache stands for: the records, reading and extending them, and refusing what can't go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..arguments import CACHE
from ..config import BEFORE_THE_DECODER, GapConfig, first_later
from .columns import Columns, fixed_columns, growing_columns

CACHE_ATTRIBUTE = "_gap_kept_tokens"
UNFINISHED_ATTRIBUTE = "_gap_unfinished"  # of a cache that a pruned forward has begun to fill
HELD_ATTRIBUTE = (
    "_gap_counts_held"  # of a cache that answers by what it holds, and not as if nothing had been dropped
)
STEP_ATTRIBUTE = "_gap_step"  # of a cache in a plain decode step: that step
LENGTH_ATTRIBUTE = "_gap_full_length"  # of a cache that `gap_triton.static_cache` made

ROOM = 256  # tokens that `Columns` of a cache that grows are made for at once


@dataclass(frozen=True)
class KeptRows:
    """What the layers after one pruning layer, up to the next, hold.

    Attributes:
        layer: The pruning layer.
        index: [B, n] int64. Original position (without pruning, counted from the start of the cache) of each column
            that the later layers hold, ascending; -1 marks a column that no row may attend to (filler or padding).
        covered: Number of original positions that ``index`` accounts for, up to the end of the last pruned prompt. What
            comes after is held one to one.
        dense: No -1 in ``index``; known on the host.
        id_shift: [B] (or [A, B] on several axes) int64, how much smaller the ids of following tokens are in the later
            layers; None = not at all.
    """

    layer: int
    index: torch.Tensor
    covered: int
    dense: bool
    id_shift: torch.Tensor | None = None

    @property
    def first_later(self) -> int:
        """Index of the first later layer, the first that lacks what was dropped."""
        return first_later(self.layer)

    @property
    def dropped(self) -> int:
        """How many columns fewer the later layers hold than a layer from which nothing was dropped."""
        return self.covered - self.index.shape[1]


@dataclass
class KeptTokens:
    """What all layers hold of what was pruned. Stored on the KV cache object, so it stays with its generation.

    Attributes:
        stages: One record for each pruning layer, first to last.
        ids: The id rule that the survivors follow.
        text_independent: Text that follows can't change the choice: no score looks at text, and the rows so far don't end in
            an image.
        complete: Generated tokens follow the pruned prompt, so it was complete.
        dense: No -1 in any record.
        renumbered: Later tokens have smaller ids in later layers.
        held: By stage: its first later layer, how many columns that holds at least, and how many fewer than without pruning.
        columns: Where the columns of later layers stand in the mask of a decode step; None until a step, or a static cache,
            needs it.
        plain_steps: A decode step needs nothing of later layers where the model makes no mask: nothing of theirs is to be
            hidden, ids are those without pruning, and the cache grows. False until that is known.
    """

    stages: tuple[KeptRows, ...]
    ids: str
    text_independent: bool = False
    complete: bool = False
    dense: bool = field(init=False)
    renumbered: bool = field(init=False)
    held: tuple[tuple[int, int, int], ...] = field(init=False, repr=False)
    columns: Columns | None = field(default=None, init=False, repr=False)
    plain_steps: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.dense = all(stage.dense for stage in self.stages)
        self.renumbered = any(stage.id_shift is not None for stage in self.stages)
        self.held = tuple((each.first_later, each.index.shape[1], each.dropped) for each in self.stages)

    @property
    def layers(self) -> tuple[int, ...]:
        """The pruning layers."""
        return tuple(stage.layer for stage in self.stages)

    @property
    def covered(self) -> int:
        """Number of original positions that the records account for."""
        return self.stages[0].covered

    def stage_at(self, layer: int) -> int | None:
        """Return the number of the last stage before decoder layer ``layer``; None where that holds everything."""
        for number in range(len(self.stages) - 1, -1, -1):
            if self.stages[number].layer < layer:
                return number
        return None

    def at(self, layer: int) -> KeptRows | None:
        """Return what decoder layer ``layer`` holds; None where it holds everything."""
        number = self.stage_at(layer)
        return None if number is None else self.stages[number]

    def dropped_at(self, layer: int) -> int:
        """Return how many columns fewer decoder layer ``layer`` holds than one from which nothing was dropped."""
        dropped = 0
        for stage in self.stages:
            if stage.layer >= layer:
                break
            dropped = stage.dropped
        return dropped

    def map(self, change: Callable[[KeptRows], KeptRows]) -> KeptTokens:
        """Return the same with ``change`` made to every record."""
        return replace(self, stages=tuple(map(change, self.stages)))


def store(cache: Any | None, kept: KeptTokens) -> None:
    """Let the cache carry ``kept`` to the next forward; nothing to do without a cache."""
    if cache is not None:
        setattr(cache, CACHE_ATTRIBUTE, kept)


def kept_tokens_of(cache: Any | None, batch: int) -> KeptTokens | None:
    """Return what the cache's later layers hold, None where nothing was dropped from it.

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


def is_unpruned(cache: Any | None) -> bool:
    """Return whether a decode step on ``cache`` is as in any model: nothing was dropped, and its size is not ours."""
    return (
        getattr(cache, CACHE_ATTRIBUTE, None) is None
        and getattr(cache, LENGTH_ATTRIBUTE, None) is None
        and not getattr(cache, UNFINISHED_ATTRIBUTE, False)
    )


def has_plain_steps(cache: Any | None) -> bool:
    """Return whether tokens were dropped from ``cache``, and decode steps are plain; see `KeptTokens.plain_steps`."""
    kept: KeptTokens | None = getattr(cache, CACHE_ATTRIBUTE, None)
    return kept is not None and kept.plain_steps


def leave_step(cache: Any, step: Any) -> None:
    """Leave a plain decode step with its cache while it runs: among the arguments of every layer it would cost more."""
    setattr(cache, STEP_ATTRIBUTE, step)


def step_left(cache: Any | None) -> Any | None:
    """Return what `leave_step` left with ``cache``; None where it left nothing."""
    return getattr(cache, STEP_ATTRIBUTE, None)


def take_step(cache: Any) -> None:
    """Take what `leave_step` left with ``cache``."""
    delattr(cache, STEP_ATTRIBUTE)


def mark_unfinished(cache: Any) -> None:
    """Mark the cache of a forward that drops, or that adds several rows to a pruned cache.

    `mark_finished` takes the mark away. An exception in between leaves it.
    """
    setattr(cache, UNFINISHED_ATTRIBUTE, True)


def mark_finished(cache: Any | None) -> None:
    """Take away the mark of `mark_unfinished`."""
    if cache is not None:
        delattr(cache, UNFINISHED_ATTRIBUTE)


def count_held(cache: Any | None, held: bool) -> None:
    """Let a cache answer by what it ``held``, as the decoder asks that is handed the survivors alone; or as before."""
    if cache is not None:
        setattr(cache, HELD_ATTRIBUTE, held)


def length_in_step(
    cache: Any | None, kept: KeptTokens, cache_position: torch.Tensor | None
) -> int | torch.Tensor:
    """Return `original_length` in a decode step; of a static cache as an int64 tensor of no dimension: nothing is read."""
    if cache is None:
        return 0
    if is_static(cache, kept.stages[0].first_later):
        return _static_length(cache, kept, cache_position)
    return dynamic_length(cache, kept)


def original_length(cache: Any | None, kept: KeptTokens | None, cache_position: torch.Tensor | None) -> int:
    """Return the number of tokens that the cache stands for, dropped ones included.

    Args:
        cache: The KV cache of the running forward.
        kept: What its later layers hold.
        cache_position: [Q], original positions of the new rows, where this release of transformers passes them.

    Raises:
        ValueError: Earlier and later layers disagree, because the cache was changed by other means than its methods.
    """
    if cache is None:
        return 0
    if kept is None:
        return int(cache.get_seq_length())
    if is_static(cache, kept.stages[0].first_later):
        return int(_static_length(cache, kept, cache_position))
    return dynamic_length(cache, kept)


def dynamic_length(cache: Any, kept: KeptTokens) -> int:
    """Return the number of tokens that a cache that grows stands for, dropped ones included.

    Raises:
        ValueError: Its layers disagree, because the cache was changed by other means than its methods.
    """
    length = -1
    if kept.stages[0].layer != BEFORE_THE_DECODER:
        first = cache.layers[0]
        length = int((first if hasattr(first, "get_seq_length") else cache).get_seq_length())
    for number, at_least, dropped in kept.held:
        layer = cache.layers[number]
        if not hasattr(layer, "get_seq_length"):
            layer = layer_that_counts(cache, number)
        if layer is None:
            continue
        held = int(layer.get_seq_length())
        stands_for = held + dropped
        if held < at_least or length not in (-1, stands_for):
            raise _changed_from_outside(cache, kept)
        length = stands_for
    return length


def _changed_from_outside(cache: Any, kept: KeptTokens) -> ValueError:
    counting = ((stage, layer_that_counts(cache, stage.first_later)) for stage in kept.stages)
    stages = [(stage, int(layer.get_seq_length())) for stage, layer in counting if layer is not None]
    lengths = [length + stage.dropped for stage, length in stages]
    if kept.stages[0].layer != BEFORE_THE_DECODER:
        lengths.insert(0, int(cache.get_seq_length()))
    by_layer = ", ".join(f"layer {stage.first_later} {length}" for stage, length in stages)
    return ValueError(
        f"{CACHE} was changed behind its own methods after it was pruned: {by_layer} tokens are held, which with "
        f"what was dropped stand for {' and '.join(map(str, lengths))}, layer 0 first. Use {CACHE}.crop(...), "
        "which knows what was dropped, or start a new cache"
    )


def counts(cache_layer: Any) -> bool:
    """Return whether a layer of a cache knows how many tokens it holds; recurrent states and layers without cache don't."""
    return hasattr(cache_layer, "get_seq_length")


def layer_that_counts(cache: Any, layer: int) -> Any | None:
    """Return the cache's layer of the first attention at or behind decoder layer ``layer``; None where none follows."""
    return next((each for each in cache.layers[layer:] if counts(each)), None)


def is_static(cache: Any | None, layer: int) -> bool:
    """Return whether ``cache`` keeps decoder layer ``layer``, or the attention behind it, in a buffer of fixed size."""
    if cache is None or layer >= len(cache.layers):
        return False
    held = cache.layers[layer]
    if not hasattr(held, "get_seq_length"):
        held = layer_that_counts(cache, layer)
    return bool(cache.is_compileable) if held is None else getattr(held, "is_compileable", False)


def _static_length(cache: Any, kept: KeptTokens, cache_position: torch.Tensor | None) -> int | torch.Tensor:
    length: int | torch.Tensor = 0
    for index, layer in enumerate(cache.layers):
        if not counts(layer) or not layer.is_initialized:
            continue
        # A new tensor: the layer's own is counted up in place while the forward runs.
        length = layer.get_seq_length() + kept.dropped_at(index)
        if isinstance(length, int):  # sliding layers count on the host
            break
    # Where positions are passed, static layers guess their length from their contents.
    return length if isinstance(length, int) or cache_position is None else cache_position[0]


def growing_columns_of(kept: KeptTokens, tokens: int) -> Columns:
    """Make, and keep in ``kept``, the columns of a cache that will stand for ``tokens`` tokens, and soon for more."""
    following = tokens - kept.covered + ROOM
    indices = [stage.index for stage in kept.stages]
    kept.columns = growing_columns(indices, kept.covered, kept.dense, following)
    return kept.columns


def make_fixed_columns(cache: Any, kept: KeptTokens) -> None:
    """Make, and keep in ``kept``, the columns of a static cache all of whose layers attend to everything."""
    width = getattr(cache, LENGTH_ATTRIBUTE, None)
    if width is None:
        width = cache.layers[0].max_cache_len + kept.dropped_at(0)
    indices = [stage.index for stage in kept.stages]
    lengths = [cache.layers[stage.first_later].max_cache_len for stage in kept.stages]
    kept.columns = fixed_columns(indices, kept.covered, kept.dense, lengths, width)


def _refuse_unfinished_cache(cache: Any | None) -> None:
    if getattr(cache, UNFINISHED_ATTRIBUTE, False):
        raise ValueError(
            f"{CACHE} is left from a forward that failed before its last layer, so some layers hold its tokens and others "
            "don't: start a new cache, or reset() this one"
        )


def refuse_pruned_cache(cache: Any | None) -> None:
    """Raise ValueError if ``cache`` was pruned: called where the run would not know what it lacks."""
    _refuse_unfinished_cache(cache)
    if getattr(cache, CACHE_ATTRIBUTE, None) is not None:
        raise ValueError(
            f"{CACHE} was pruned, and goes on in a model that does not prune now (training mode, another attention "
            "implementation, or a call of the decoder by itself): go on with the model that pruned it, or start a new cache"
        )


def refuse_continuation(kept: KeptTokens, config: GapConfig | None, queries: int, has_image: bool) -> None:
    """Refuse a block of ``queries`` > 1 tokens that the cache can't take.

    Args:
        kept: What the cache's later layers hold.
        config: How this block is pruned, None where it is not.
        queries: Number of tokens in the block.
        has_image: There are visual tokens among them.

    Raises:
        ValueError: The pruned prompt was not complete, and its choice depends on what follows; or the cache was pruned after
            another layer, by another id rule, or before the decoder.
    """
    if not kept.complete and (has_image or not kept.text_independent):
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


def extend(
    before: KeptRows | None,
    layer: int,
    positions: torch.Tensor,
    *,
    past: int,
    queries: int,
    real: torch.Tensor | None,
    dense: bool,
) -> KeptRows:
    """Return what the layers after a stage hold, after the rows of a pruned prompt.

    Args:
        before: What they held before; None where nothing had been dropped.
        layer: The pruning layer.
        positions: [B, L] int64, original positions of the surviving rows, -1 = filler or padding. Drafts are not among them:
            like all that follows a prompt, they are held one to one.
        past: Number of original positions before the prompt.
        queries: Number of rows of the prompt.
        real: [B, past + Q] bool, False at padding, of what was before; None = no padding.
        dense: No -1 in ``positions``, known on the host.
    """
    covered = 0 if before is None else before.covered
    parts = [] if before is None else [before.index]
    if covered < past:
        between = torch.arange(covered, past, device=positions.device).expand(positions.shape[0], -1)
        if real is not None:
            between = torch.where(real[:, covered:past].to(between.device), between, -1)
        parts.append(between)
    return KeptRows(
        layer=layer,
        index=torch.cat([*parts, positions], dim=1) if parts else positions,
        covered=past + queries,
        # Of earlier tokens only the device knows whether they are padding.
        dense=dense and before is None and past == 0,
        id_shift=None if before is None else before.id_shift,
    )
