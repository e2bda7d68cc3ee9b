"""Computing in the dtypes that a function documents, whatever ``torch.autocast`` is on around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Switch autocast off inside a function, for the kind of device of its first tensor.

    Under autocast a matrix product of float32 tensors is one of bfloat16: other bits, and another dtype than documented.

    Args:
        function: Takes a tensor. What is no tensor, it refuses itself.
    """

    @functools.wraps(function)
    def in_own_dtypes(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = args[0] if args else None
        if not isinstance(tensor, Tensor):
            tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        kind = "meta" if tensor is None else tensor.device.type
        # Where there is no autocast, as of meta tensors, asking for its state would be an error.
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return in_own_dtypes
