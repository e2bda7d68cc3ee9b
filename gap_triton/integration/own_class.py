"""A class of its own for one module: the class that it had, by the same name, called in another way.

A hook of torch sees calls too, but with any hook on a module torch leaves its short way, and takes some hundred steps of
Python in each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

BASE = "_gap_base"  # of a class that is made here: the class that the module had
TORCH_CALL: Any = nn.Module.__call__  # some tools of torch put another in its place for a while

CallOf = Callable[
    [Any], Callable[..., Any]
]  # makes the `__call__` of a class that is like the one that it gets


def change_class(module: nn.Module, call_of: CallOf) -> None:
    """Give ``module`` a class like its own, which calls as ``call_of`` says; once.

    Args:
        module: The module.
        call_of: A function of a module, by which copies and pickles name it.
    """
    base: Any = type(module)
    if not hasattr(base, BASE):
        # Past nn.Module, where what torch.compile returns would hand it on to the module that it holds.
        object.__setattr__(module, "__class__", _class_like(base, call_of))


def give_class_back(module: nn.Module) -> None:
    """Give ``module`` the class that it had; not if somebody has made it another class since."""
    base = vars(type(module)).get(BASE)
    if base is not None:
        object.__setattr__(module, "__class__", base)


@functools.cache
def _class_like(base: Any, call_of: CallOf) -> Any:
    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        made: tuple[Any, ...] = base.__reduce_ex__(self, protocol)
        if BASE not in vars(type(self)):
            return made  # somebody has made it another class since
        make, arguments, *rest = made
        without = tuple(base if each is type(self) else each for each in arguments)
        return _made_again, (call_of, base if make is type(self) else make, *without), *rest

    body = {
        "__call__": call_of(base),
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


def _made_again(call_of: CallOf, make: Callable[..., Any], *arguments: Any) -> Any:
    """A copy of a module, of a class that a pickle can't name."""
    module = make(*arguments)
    change_class(module, call_of)
    return module
