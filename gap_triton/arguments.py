"""Arguments of a forward by their names, in every supported release of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from packaging.version import Version
from torch import nn

STATE_KEY = "gap_state"  # the state of one forward, which travels through the model
HEAD_KEY = "gap_head"  # arguments that the module with the language head hands on
VISUAL_MASK = "visual_mask"  # the caller names the visual tokens, in forward() and generate()
VISUAL_GRID = "visual_grid"  # and their rows and columns
VISUAL_ENCODING = "visual_encoding"  # what encoded them, before a decoder alone, with what was recorded of it
VISUAL_PROMPT = "visual_prompt"  # what `gap_triton.prepare` has read of the prompt
# All that forward() and generate() of attached models take besides what the model takes.
OWN_ARGUMENTS = (VISUAL_MASK, VISUAL_GRID, VISUAL_PROMPT, VISUAL_ENCODING)

# transformers 5.24 renamed `past_key_values`, and takes the old name too for some releases.
CACHE = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"
"""What this release calls the KV cache among the arguments of a forward and of `generate`."""

CACHE_NAMES = tuple(dict.fromkeys((CACHE, "past_key_values")))
# Older names included: attention modules had the singular before they had the plural.
ALL_CACHE_NAMES = ("cache", "past_key_values", "past_key_value")


def cache_of(kwargs: dict[str, Any]) -> Any | None:
    """Return the KV cache of a call with these keyword arguments, None where it has none.

    Where a call has it under two names the newer one counts, as in transformers.
    """
    for name in CACHE_NAMES:
        if name in kwargs:
            return kwargs[name]
    return None


def by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call of ``module`` with all but its first positional argument given by name, as hooks look for them there."""
    if len(args) < 2:
        return args, kwargs
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    names = list(bound.arguments)[1 : len(args)]
    return args[:1], {**kwargs, **{name: bound.arguments[name] for name in names}}
