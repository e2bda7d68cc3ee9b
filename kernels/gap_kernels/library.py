"""Registration of operators with PyTorch, in the way that costs least per call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from .precision import without_autocast

# The name that this package was imported by: PyTorch takes a namespace once in a process, which may hold copies of this
# package under other names, as Hugging Face's `kernels` loads them.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])
# `torch.library.custom_op` would do the same for several times the host time of a call.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the implementation of an operator, for every device, with autocast off.

    The function's own signature is that of the operator. It must not return one of its arguments, nor change one.

    Args:
        name: Of the operator, without the namespace.

    Returns:
        A decorator that returns the operator, to be called instead of the function.
    """

    def register(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=(), op_name=name)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, without_autocast(function), "CompositeExplicitAutograd")
        return _registered(name)

    return register


def _registered(name: str) -> Any:
    """Return the operator of a name."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the one that says what shapes and dtypes an operator returns.

    The function takes the arguments of the operator that it uses, under their names.
    """
    names = [argument.name for argument in _registered(name)._schema.arguments]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        used = inspect.signature(function).parameters

        def by_name(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return function(**{argument: value for argument, value in given.items() if argument in used})

        torch.library.register_fake(f"{NAMESPACE}::{name}", by_name, lib=LIBRARY)
        return function

    return register


def gradient(name: str, backward: Callable[..., Any], setup: Callable[..., None] | None = None) -> None:
    """Register the gradient of an operator; ``setup`` saves what ``backward`` needs."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=LIBRARY)


def no_gradient(name: str) -> None:
    """Make the backward pass through an operator an error, where PyTorch alone would only warn."""

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"gap_kernels.{name} has no gradient: detach() its inputs, or call it in no_grad()"
        )

    gradient(name, backward)
