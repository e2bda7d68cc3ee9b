"""Decode steps of one token, by what a module is called with: most need little of the hooks, or nothing."""

from __future__ import annotations

from typing import Any

from ..arguments import HEAD_KEY, OWN_ARGUMENTS
from ..prefill.answers import GENERATED

OURS = frozenset({HEAD_KEY, *OWN_ARGUMENTS})


def is_one_row(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a module that gets tokens, or their embeddings, is called with one of each sample."""
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    return inputs is not None and len(args) < 2 and inputs.shape[1] == 1


def is_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call has one row, from which nothing can be dropped, and asks for nothing that must be refused."""
    if GENERATED in kwargs or kwargs.get("output_attentions"):
        return False
    return is_one_row(args, kwargs)


def has_ours(kwargs: dict[str, Any]) -> bool:
    """Return whether arguments that only the hooks know are among ``kwargs``."""
    return not OURS.isdisjoint(kwargs)
