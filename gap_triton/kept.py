"""What a pruned KV cache stands for: reading, extending and storing `KeptTokens`, and refusing what can't go on."""

from __future__ import annotations

from typing import Any

import torch

from .config import BEFORE_THE_DECODER, GapConfig
from .state import ForwardState, KeptTokens

CACHE_ATTRIBUTE = "_gap_kept_tokens"


def store(cache: Any | None, kept: KeptTokens) -> None:
    """Let the cache carry ``kept`` to the next forward; nothing to do without a cache."""
    if cache is not None:
        setattr(cache, CACHE_ATTRIBUTE, kept)


def kept_tokens_of(cache: Any | None, batch: int) -> KeptTokens | None:
    """What the cache's later layers hold, None where nothing was dropped from it.

    Raises:
        ValueError: The cache was pruned for another batch size.
    """
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


def original_length(cache: Any | None, kept: KeptTokens | None) -> int:
    """Number of tokens that the cache stands for, dropped ones included.

    Raises:
        ValueError: Earlier and later layers disagree, because the cache was changed behind our back.
    """
    if cache is None:
        return 0
    if kept is None:
        return int(cache.get_seq_length())
    held = int(cache.get_seq_length(kept.layer + 1))
    if held < kept.index.shape[1]:
        raise ValueError(
            f"past_key_values was cropped into its pruned prompt: layer {kept.layer + 1} holds {held} of "
            f"{kept.index.shape[1]} tokens, and layers no longer agree on which. Crop generated tokens only, or start a new "
            "cache; assisted decoding, which crops its drafts, can't be combined with pruning"
        )
    length = kept.original_length(held)
    if kept.layer != BEFORE_THE_DECODER and length != int(cache.get_seq_length(0)):
        raise ValueError(
            f"past_key_values holds {int(cache.get_seq_length(0))} tokens in layer 0 but stands for {length} in layer "
            f"{kept.layer + 1}: it was cropped to an absolute length after pruning; crop by a number of tokens, or start a "
            "new cache"
        )
    return length


def refuse_pruned_cache(cache: Any | None) -> None:
    """Raise ValueError if ``cache`` was pruned: called where nothing will be done about what it lacks."""
    if getattr(cache, CACHE_ATTRIBUTE, None) is not None:
        raise ValueError(
            "past_key_values was pruned, and goes on in a model that does not prune now (training mode, another attention "
            "implementation, or a call of the decoder by itself): go on with the model that pruned it, or start a new cache"
        )


def refuse_continuation(kept: KeptTokens, config: GapConfig | None, queries: int) -> None:
    """Refuse a block of ``queries`` > 1 tokens that the cache can't take.

    Args:
        kept: What the cache's later layers hold.
        config: How this block is pruned, None where it is not.
        queries: Number of tokens in the block.

    Raises:
        ValueError: The pruned prompt was not complete; or the cache was pruned after another layer, by another id rule, or
            before the decoder.
    """
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
    if config is None:
        return
    if config.layer != kept.layer:
        raise ValueError(
            f"GapConfig.layer={config.layer}, but this cache was pruned after layer {kept.layer}: go on with that layer, or "
            "start a new cache"
        )
    if config.ids != kept.ids:
        raise ValueError(
            f"GapConfig.ids={config.ids!r}, but this cache was pruned with {kept.ids!r}: go on with that rule, or start a "
            "new cache"
        )


def extend(state: ForwardState, positions: torch.Tensor, dense: bool) -> KeptTokens:
    """What the later layers hold once they have taken this forward's rows.

    Args:
        state: The running forward, with what they held before in ``state.kept``.
        positions: [B, L] int64, original positions of the new rows, -1 = filler.
        dense: Whether all of ``positions`` are known to be real tokens.

    Returns:
        The extension of ``state.kept``, or a new record where nothing had been dropped.
    """
    before = state.kept
    covered = 0 if before is None else before.covered
    between = torch.arange(covered, state.past, device=positions.device).expand(positions.shape[0], -1)
    new = torch.cat([between, positions], dim=1)
    if state.real is not None:
        new = torch.where((new >= 0) & state.real.to(new.device).gather(1, new.clamp(min=0)), new, -1)
    pruned = state.plan is not None
    return KeptTokens(
        layer=state.config.layer if before is None else before.layer,
        index=new if before is None else torch.cat([before.index, new], dim=1),
        covered=state.past + state.queries,
        # Of earlier tokens only the device knows whether they are padding.
        dense=dense and before is None and state.past == 0,
        ids=state.config.ids if before is None else before.ids,
        id_shift=None if before is None else before.id_shift,
        settled=not pruned,
    )
