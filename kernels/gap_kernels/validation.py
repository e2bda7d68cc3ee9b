"""Argument checks shared by the public functions.

Everything here looks at types, shapes, dtypes and devices only, so it costs no device synchronisation and can
be traced by ``torch.compile``. Value ranges are checked inside the operators, and only for CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(value: object) -> str:
    """Return what a caller passed, in the words of an error message."""
    if isinstance(value, Tensor):
        return f"shape {list(value.shape)}, {value.dtype}, device {value.device}"
    return f"{value!r} ({type(value).__name__})"


class ShapeChecker:
    """Checks tensors against named dimensions; a name means one size in all tensors of a call.

    The first tensor to use a name fixes its size, and the first tensor of all fixes the device.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None

    def check(self, name: str, value: object, dims: str, dtypes: Sequence[torch.dtype]) -> None:
        """Check one argument and remember its sizes.

        Args:
            name: argument name, used in messages.
            value: the argument.
            dims: names of the dimensions, separated by blanks, such as ``"B Hq Q D"``.
            dtypes: accepted dtypes.

        Raises:
            ValueError: if the argument isn't a tensor of that shape, dtype and device.
        """
        names = dims.split()
        if isinstance(value, Tensor) and value.dtype in dtypes and value.dim() == len(names):
            device = value.device
            if self.device is None:
                self.device = device
            if device == self.device:
                for dim, size in zip(names, value.shape, strict=True):
                    if self.sizes.setdefault(dim, size) != size:
                        break
                else:
                    return
        self._refuse(name, value, names, dtypes)

    def _refuse(self, name: str, value: object, names: list[str], dtypes: Sequence[torch.dtype]) -> NoReturn:
        """Say what is wrong with an argument; apart from ``check``, which every call pays for."""
        shape = "[" + ", ".join(names) + "]"
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor {shape}, got {describe(value)}")
        if value.dtype not in dtypes:
            allowed = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{name}: expected dtype {allowed}, got {describe(value)}")
        if value.dim() != len(names):
            raise ValueError(f"{name}: expected {len(names)} dimensions {shape}, got {describe(value)}")
        for dim, size in zip(names, value.shape, strict=True):
            known = self.sizes.get(dim, size)
            if size != known:
                raise ValueError(f"{name}: expected {shape} with {dim} = {known}, got {describe(value)}")
        raise ValueError(f"{name}: expected device {self.device}, got {describe(value)}")


def check_options(causal: object, scale: object) -> None:
    """Check the arguments that aren't tensors.

    Raises:
        ValueError: if ``causal`` isn't a bool, or ``scale`` neither a number nor None.
    """
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected a bool, got {describe(causal)}")
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        raise ValueError(f"scale: expected a float or None, got {describe(scale)}")


def is_int(value: object) -> TypeGuard[int]:
    """Return whether the value is an integer (a traced one counts, a bool doesn't)."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def split_count(name: str, value: object, shapes: ShapeChecker) -> tuple[int, Tensor | None]:
    """Turn "an int, or one per sample" into the pair that the operators take.

    Args:
        name: argument name, used in messages.
        value: int, or int64 tensor [B].
        shapes: the call's shapes; ``B`` is already known.

    Returns:
        ``(count, counts)``: ``counts`` is the tensor or None, ``count`` is the int (0 beside a tensor).

    Raises:
        ValueError: if the value is neither, or a negative int.
    """
    if isinstance(value, Tensor):
        shapes.check(name, value, "B", (torch.int64,))
        return 0, value
    if not is_int(value):
        raise ValueError(f"{name}: expected an int or an int64 tensor [B], got {describe(value)}")
    if value < 0:
        raise ValueError(f"{name}: expected a count >= 0, got {value}")
    return value, None


def check_length(value: object, at_least: int) -> None:
    """Check an explicit output length.

    Raises:
        ValueError: if it isn't an int, or less than ``at_least``.
    """
    if not is_int(value):
        raise ValueError(f"length: expected an int or None, got {describe(value)}")
    if value < at_least:
        raise ValueError(f"length: expected at least {at_least}, got {value}")


def width_of(name: str, count: int, counts: Tensor | None, length: int | None) -> int:
    """Number of columns of a result with ``count`` entries, or ``counts`` [B] of them by sample.

    Args:
        name: argument name of the counts, used in messages.
        count: how many, beside a tensor the least that is known.
        counts: int64 [B], or None.
        length: what the caller asks for; None = ``count``, or the largest of ``counts``, which takes one read.

    Raises:
        ValueError: if ``length`` is less than ``count``, or missing where ``counts`` can't be read.
    """
    if length is not None:
        check_length(length, at_least=count)
        return length
    if counts is not None:
        return read_max(counts, f"the number of columns depends on the values of {name}")
    return count


def check_range(name: str, value: Tensor, low: int, high: int) -> None:
    """Check that every entry of a CPU tensor lies in ``low..high`` (both inclusive).

    Raises:
        ValueError: naming the first offending value.
    """
    outside = (value < low) | (value > high)
    if bool(outside.any()):
        found = int(value[outside][0])
        raise ValueError(f"{name}: expected values in {low}..{high}, got {found}")


def read_max(counts: Tensor, reason: str) -> int:
    """Read the largest entry of an int64 tensor [B] to the host; 0 if it is empty.

    Args:
        counts: int64 [B].
        reason: what the value decides, for the message.

    Raises:
        ValueError: where a host read isn't possible: while compiling and during CUDA graph capture.
    """
    if torch.compiler.is_compiling():
        raise ValueError(f"length: {reason}; pass length=... when compiling or exporting, got None")
    if counts.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"length: {reason}; pass length=... while capturing a CUDA graph, got None")
    return int(counts.max()) if counts.numel() else 0
