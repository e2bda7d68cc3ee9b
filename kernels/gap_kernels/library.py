"""Registration of operators with PyTorch, in the way that costs least per call."""

from __future__ import annotations

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


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as the implementation of an operator, for every device, with autocast off.

    The function must not return one of its arguments, nor change one.

    Args:
        schema: name, arguments and results, such as ``"twice(Tensor x) -> Tensor"``.

    Returns:
        a decorator that returns the operator, to be called instead of the function.
    """
    name = schema.split("(", 1)[0]

    def register(function: Callable[..., Any]) -> Any:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, without_autocast(function), "CompositeExplicitAutograd")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the one that says what shapes and dtypes an operator returns."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=LIBRARY)


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
