"""The short way of a decode step past the hooks of torch, where there are no others on a module than ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .own_class import TORCH_CALL, change_class, give_class_back

SHORT = "_gap_short_way"  # of a module: what takes it
NO_STEP = object()
"""What `ShortWay.take` returns of a call in which hooks have something to do, without having called anything."""

Take = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class ShortWay:
    """What takes the place of hooks in the steps of one module.

    Attributes:
        module: The module.
        take: Gets the module, the arguments by position and those by name; runs the module's forward, and returns its
            output or `NO_STEP`.
        hooks: The ids of our hooks on the module.
    """

    module: nn.Module
    take: Take
    hooks: frozenset[int]

    def remove(self) -> None:
        """Take it off, if it is still there; the module gets back the class that it had."""
        if self.module.__dict__.get(SHORT) is self:
            del self.module.__dict__[SHORT]
            give_class_back(self.module)


def put_short_way(module: nn.Module, take: Take, hooks: frozenset[int]) -> ShortWay:
    """Let calls of ``module`` ask ``take`` first, as long as nobody else has put hooks on it; see `ShortWay`."""
    way = ShortWay(module, take, hooks)
    module.__dict__[SHORT] = way
    change_class(module, call_of_module)
    return way


def call_of_module(base: Any) -> Callable[..., Any]:
    """Make the ``__call__`` of a class like ``base``, whose instances ask `SHORT`."""

    # Its name tells that a call of the module is under way, as that of torch does; see `Attachment.is_running`.
    def short_call_impl(self: Any, *args: Any, **kwargs: Any) -> Any:
        attributes = self.__dict__
        way = attributes.get(SHORT)
        if (
            way is not None
            and not torch.compiler.is_dynamo_compiling()
            and base.__call__ is TORCH_CALL
            and is_bare(attributes, way.hooks)
        ):
            output = way.take(self, args, kwargs)
            if output is not NO_STEP:
                return output
        return base.__call__(self, *args, **kwargs)

    return short_call_impl


def is_bare(attributes: dict[str, Any], but: frozenset[int]) -> bool:
    """Return whether torch, when a module is called, has nothing to do but its forward and the hooks ``but``.

    Args:
        attributes: Those of the module, past `nn.Module`, which would look for each in its class first.
        but: The ids of hooks.
    """
    return (
        but.issuperset(attributes["_forward_pre_hooks"])
        and but.issuperset(attributes["_forward_hooks"])
        and not (
            attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or attributes.get("_compiled_call_impl")
            or _global_forward_pre_hooks
            or _global_forward_hooks
            or _global_backward_pre_hooks
            or _global_backward_hooks
        )
    )
