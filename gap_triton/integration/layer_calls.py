"""What runs before a decoder layer is called, at next to no cost where it has nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..arguments import STATE_KEY, cache_of
from ..kv_cache.kept_tokens import step_left
from .own_class import TORCH_CALL, change_class, give_class_back

BEFORE = "_gap_before"  # of a layer: what is asked before it is called

Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What was put before the calls of one layer.

    Attributes:
        layer: The layer.
        before: What is asked.
    """

    layer: nn.Module
    before: Before

    def remove(self) -> None:
        """Take it off, if it is still there; the layer gets back the class that it had."""
        if self.layer.__dict__.get(BEFORE) is self.before:
            del self.layer.__dict__[BEFORE]
            give_class_back(self.layer)


def put_before(layer: nn.Module, before: Before) -> LayerCall:
    """Let ``before`` see each call of ``layer`` that belongs to a forward with a state.

    Args:
        layer: The layer. What another model has put before it, of which it is a layer too, is taken off.
        before: As a pre-hook of torch with keyword arguments: gets the layer, the arguments by position and those by name,
            and returns those that the layer is to get, or None for the same.
    """
    layer.__dict__[BEFORE] = before
    change_class(layer, call_of_layer)
    return LayerCall(layer, before)


def carries(module: nn.Module) -> bool:
    """Return whether something is put before the calls of ``module``."""
    return BEFORE in module.__dict__


def call_of_layer(base: Any) -> Callable[..., Any]:
    """Make the ``__call__`` of a class like ``base``, whose instances ask `BEFORE`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = kwargs.get(STATE_KEY)
        if state is None:
            if kwargs.get("attention_mask") is not None:
                step = step_left(cache_of(kwargs))
                if step is not None:
                    state = kwargs[STATE_KEY] = step.state()
        elif state.passes and kwargs.get("attention_mask") is None:
            state = None
        if state is not None:
            before = self.__dict__.get(BEFORE)
            given = None if before is None else before(self, args, kwargs)
            if given is not None:
                args, kwargs = given
        if base.__call__ is TORCH_CALL and self._compiled_call_impl is None:
            return self._call_impl(
                *args, **kwargs
            )  # all that torch's own does, which this one takes the place of
        return base.__call__(self, *args, **kwargs)

    return call
