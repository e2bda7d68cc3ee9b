"""Sizing the layers of a static cache as short as pruning lets them be."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, StaticCache

from .kept_tokens import LENGTH_ATTRIBUTE, counts, is_static


def make(config: PretrainedConfig, length: int) -> StaticCache:
    """Return a static cache that `fit` may size, for a decoder and ``length`` tokens, dropped ones included."""
    cache = StaticCache(config=config, max_cache_len=length)
    setattr(cache, LENGTH_ATTRIBUTE, length)
    return cache


def fit(cache: Any | None, shorter: dict[int, int]) -> None:
    """Size the layers of a `static_cache` from which nothing has been dropped yet.

    Args:
        cache: Any cache; only those of `static_cache` are changed, and only where a size is not right yet.
        shorter: By the first layer that lacks them, ascending, how many rows of the first prompt it and those after it lack;
            empty where nothing is dropped.
    """
    length = getattr(cache, LENGTH_ATTRIBUTE, None)
    if cache is None or length is None:
        return
    for index, layer in enumerate(cache.layers):
        if not counts(layer) or not is_static(cache, index) or getattr(layer, "is_sliding", False):
            continue
        size = length - next((rows for first, rows in reversed(shorter.items()) if first <= index), 0)
        if layer.max_cache_len != size:
            layer.max_cache_len = size
            layer.is_initialized = False  # the buffers are made when the layer is first written to
