"""Which path an operator takes: its PyTorch reference or its Triton kernels."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from .validation import describe

BACKENDS = ("auto", "triton", "reference")

_choice: ContextVar[str] = ContextVar("gap_kernels_backend", default="auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the path of the operators that run inside the ``with`` block, in this thread or task.

    Operators look when they run, not when they are traced, so a compiled function is called inside the block rather
    than containing it.

    Args:
        name: ``"auto"``, the default: Triton for CUDA tensors where Triton is installed, the reference elsewhere;
            ``"reference"``: PyTorch everywhere; ``"triton"``: Triton everywhere, or an error. CPU tensors then need
            Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is imported). Scores of float64 queries,
            and what compares or merges features in float64, always come from the reference.

    Raises:
        ValueError: If the name is none of these.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {describe(name)}")
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def use_triton(tensor: Tensor) -> bool:
    """Return whether an operator on this tensor takes its Triton path.

    Raises:
        RuntimeError: If ``backend("triton")`` is in force and the Triton path can't run.
    """
    choice = _choice.get()
    if choice == "reference":
        return False
    if choice == "auto":
        return tensor.is_cuda and _triton_installed()
    if not _triton_installed():
        raise RuntimeError('backend("triton"): Triton is not installed')
    if not tensor.is_cuda and not triton_is_interpreted():
        raise RuntimeError(
            f'backend("triton"): a tensor on {tensor.device} needs the interpreter, so set TRITON_INTERPRET=1 before'
            ' Triton is imported, or use backend("reference")'
        )
    return True


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_is_interpreted() -> bool:
    """Return whether Triton was imported with its interpreter on, which can't be changed afterwards."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)
