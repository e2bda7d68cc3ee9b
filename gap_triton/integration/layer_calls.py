"""What runs before a decoder layer is called, at next to no cost where it has nothing to do.

A hook of torch would do the same, but with any hook on a module torch leaves its short way, and takes some hundred steps of
Python for each layer of each decode step. So a layer that carries one of ours gets a class of its own: the class that it
had, by the same name, with one more method.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..arguments import STATE_KEY, cache_of
from ..kv_cache.kept_tokens import state_left

BEFORE = "_gap_before"  # of a layer: what is asked before it is called
BASE = "_gap_base"  # of a class that is made here: the class that the layer had

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
        if self.layer.__dict__.get(BEFORE) is not self.before:
            return
        del self.layer.__dict__[BEFORE]
        base = vars(type(self.layer)).get(BASE)
        if base is not None:  # else somebody has made it another class since, whose method does nothing now
            object.__setattr__(self.layer, "__class__", base)


def put_before(layer: nn.Module, before: Before) -> LayerCall:
    """Let ``before`` see each call of ``layer`` that belongs to a forward with a state.

    Args:
        layer: The layer. What another model has put before it, of which it is a layer too, is taken off.
        before: As a pre-hook of torch with keyword arguments: gets the layer, the arguments by position and those by name,
            and returns those that the layer is to get, or None for the same.
    """
    layer.__dict__[BEFORE] = before
    if not hasattr(type(layer), BASE):
        _change_class(layer)
    return LayerCall(layer, before)


def _change_class(layer: nn.Module) -> None:
    base: Any = type(layer)
    # Past nn.Module, where what torch.compile returns would hand it on to the module that it holds.
    object.__setattr__(layer, "__class__", _asking(base))


def carries(module: nn.Module) -> bool:
    """Return whether something is put before the calls of ``module``."""
    return BEFORE in module.__dict__


@functools.cache
def _asking(base: Any) -> Any:
    """A class like ``base``, whose instances ask `BEFORE` when they are called."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = kwargs.get(STATE_KEY)
        if state is None:
            if kwargs.get("attention_mask") is not None:
                state = state_left(cache_of(kwargs))
                if state is not None:
                    kwargs[STATE_KEY] = state
        elif state.passes and kwargs.get("attention_mask") is None:
            state = None
        if state is not None:
            before = self.__dict__.get(BEFORE)
            given = None if before is None else before(self, args, kwargs)
            if given is not None:
                args, kwargs = given
        return base.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        made: tuple[Any, ...] = base.__reduce_ex__(self, protocol)
        if BASE not in vars(type(self)):
            return made  # somebody has made it another class since
        make, arguments, *rest = made
        without = tuple(base if each is type(self) else each for each in arguments)
        return _made_again, (base if make is type(self) else make, *without), *rest

    body = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        BASE: base,
    }
    made: Any = type(base)(base.__name__, (base,), body)
    # Transformers wraps the forward of every new class of layers; this one's is wrapped already.
    if "forward" in vars(made):
        del made.forward
    return made


def _made_again(make: Callable[..., Any], *arguments: Any) -> Any:
    """A copy of a layer, of a class that a pickle can't name."""
    layer = make(*arguments)
    _change_class(layer)
    return layer
