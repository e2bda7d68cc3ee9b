"""Static caches whose later layers are as short as pruning lets them be."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, StaticCache

from ..integration.supported_models import find_parts
from ..plain import is_int, plain, shown
from .kept_tokens import LENGTH_ATTRIBUTE, is_static


def static_cache(model: PreTrainedModel, max_cache_len: int) -> StaticCache:
    """A static cache for ``model`` whose layers after the pruning layer are shorter by what the first prompt drops.

    ``generate(cache_implementation="static")`` is as exact, but gives every layer a buffer of the full length.
    The later layers' buffers are made when the prompt has been pruned. After `reset()` they are made anew if the next
    prompt drops another number of tokens; otherwise, they stay where they are.

    Args:
        model: A vision-language model that is attached, or was loaded by name.
        max_cache_len: Number of tokens that the cache can stand for, prompt and generated, dropped ones included.

    Returns:
        The cache, for ``cache=`` (``past_key_values=`` before transformers 5.24).

    Raises:
        ValueError: ``model`` can't be pruned, or ``max_cache_len`` is not a positive int.
    """
    text = find_parts(model).text
    length = plain(max_cache_len)
    if not is_int(length) or length < 1:
        raise ValueError(f"max_cache_len={shown(max_cache_len)}: expected an int >= 1, the number of tokens")
    cache = StaticCache(config=text.config, max_cache_len=length)
    setattr(cache, LENGTH_ATTRIBUTE, length)
    return cache


def fit(cache: Any | None, shorter: dict[int, int]) -> None:
    """Size the layers of a `static_cache` from which nothing has been dropped yet.

    Args:
        cache: Any cache; only those of `static_cache` are changed, and only where a size is not right yet.
        shorter: By pruning layer, ascending, how many rows of the first prompt the layers after it lack; empty where
            nothing is dropped.
    """
    length = getattr(cache, LENGTH_ATTRIBUTE, None)
    if cache is None or length is None:
        return
    for index, layer in enumerate(cache.layers):
        if not is_static(cache, index) or getattr(layer, "is_sliding", False):
            continue
        size = length - next((rows for after, rows in reversed(shorter.items()) if index > after), 0)
        if layer.max_cache_len != size:
            layer.max_cache_len = size
            layer.is_initialized = False  # the buffers are made when the layer is first written to
