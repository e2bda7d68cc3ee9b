"""``gap_triton.static_cache``: a static cache for a model that is pruned."""

from __future__ import annotations

from transformers import PreTrainedModel, StaticCache

from ..kv_cache.static_cache import make
from ..plain import is_int, plain, shown
from .supported_models import find_parts


def static_cache(model: PreTrainedModel, max_cache_len: int) -> StaticCache:
    """Return a static cache for ``model`` whose layers after the pruning layer are shorter by what the first prompt drops.

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
    return make(text.config, length)
