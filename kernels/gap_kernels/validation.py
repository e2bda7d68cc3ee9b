"""Argument checks shared by the public functions.

Everything here looks at types, shapes, dtypes and devices only, so it costs no device synchronisation and can
be traced by ``torch.compile``. Value ranges are checked inside the operators, and only for CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, TypeGuard

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.masked import MaskedTensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_LENGTH = 1 << 24
"""Most columns of a result, and cells of a grid: more than any prompt or image has, and less than memory holds."""
MAX_NUMBER = torch.finfo(torch.float32).max
"""Largest absolute value of a number that operators compute with."""


def describe(value: object) -> str:
    """Return what a caller passed, in the words of an error message."""
    if isinstance(value, Tensor):
        if value.is_nested:  # asking for its shape may be an error
            return f"a nested tensor, {value.dtype}, device {value.device}"
        kind = "" if value.layout is torch.strided else f", layout {value.layout}"
        kind += ", masked" if isinstance(value, MaskedTensor) else ""
        return f"shape {list(value.shape)}, {value.dtype}{kind}, device {value.device}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"  # Python refuses to print the longest
    return f"{_printed(value)} ({type(value).__name__})"


def describe_number(value: object) -> str:
    """Return a number that a caller passed, in few words: its type is what was expected."""
    return describe(value) if isinstance(value, int) and value.bit_length() > 64 else str(value)


def _printed(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # whatever it is, the caller is to be told which argument it was
        text = object.__repr__(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


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
            name: Argument name, used in messages.
            value: The argument.
            dims: Names of the dimensions, separated by blanks, such as ``"B Hq Q D"``.
            dtypes: Accepted dtypes.

        Raises:
            ValueError: If the argument isn't a dense tensor of that shape, dtype and device.
        """
        names = dims.split()
        if (
            isinstance(value, Tensor)
            and value.dtype in dtypes
            and value.dim() == len(names)
            and is_dense(value)
        ):
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

    def check_shared(self, name: str, value: Tensor, dims: str, dtypes: Sequence[torch.dtype]) -> None:
        """Check one argument of which each sample may have its own, or all the same: [B, ...] or [1, ...].

        Args:
            name: Argument name, used in messages.
            value: The argument.
            dims: Names of the dimensions behind the first; ``B`` is already known.
            dtypes: Accepted dtypes.

        Raises:
            ValueError: If the argument isn't a dense tensor of such a shape, dtype and device.
        """
        self.check(name, value, f"B|1 {dims}", dtypes)
        batch = self.sizes["B"]
        if value.shape[0] not in (1, batch):
            rest = dims.replace(" ", ", ")
            raise ValueError(
                f"{name}: expected [B, {rest}] with B = {batch}, or [1, {rest}], got {describe(value)}"
            )

    def _refuse(self, name: str, value: object, names: list[str], dtypes: Sequence[torch.dtype]) -> NoReturn:
        """Say what is wrong with an argument; apart from ``check``, which every call pays for."""
        shape = "[" + ", ".join(names) + "]"
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor {shape}, got {describe(value)}")
        if value.dtype not in dtypes:
            allowed = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{name}: expected dtype {allowed}, got {describe(value)}")
        if not is_dense(value):
            raise ValueError(f"{name}: expected a dense tensor {shape}, got {describe(value)}")
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
        ValueError: If ``causal`` isn't a bool, or ``scale`` neither a finite number nor None.
    """
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected a bool, got {describe(causal)}")
    if scale is not None and not is_finite(scale):
        raise ValueError(f"scale: expected a finite float or None, got {describe(scale)}")


def check_heads(query: Tensor, key: Tensor, longest: int | None = None) -> None:
    """Check the number of heads and the head_dim of tensors whose shapes are checked already.

    Args:
        query: [B, Hq, Q, D].
        key: [B, Hkv, S, D].
        longest: The largest D; None = any.

    Raises:
        ValueError: If the heads of ``query`` don't share those of ``key`` evenly, or vectors are empty or too long.
    """
    query_heads, key_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    if key_heads == 0 or query_heads == 0 or query_heads % key_heads:
        raise ValueError(
            f"query: expected a multiple of the {key_heads} heads of key, got {query_heads} heads"
            f" ({describe(query)})"
        )
    if head_dim < 1 or (longest is not None and head_dim > longest):
        wanted = "D >= 1" if longest is None else f"D in 1..{longest}"
        raise ValueError(f"query: expected {wanted}, got {describe(query)}")


def check_grid(name: str, value: object) -> None:
    """Check the rows and columns of a grid or of a part of one.

    Raises:
        ValueError: If it isn't a pair of ints >= 1, or has more than ``MAX_LENGTH`` cells.
    """
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or not all(is_int(size) and size >= 1 for size in value)
    ):
        raise ValueError(f"{name}: expected two ints >= 1, got {describe(value)}")
    if value[0] * value[1] > MAX_LENGTH:
        raise ValueError(f"{name}: expected at most {MAX_LENGTH} cells, got {describe(value)}")


def probe_of(device: torch.device | str | int | None) -> Tensor:
    """Return an empty tensor on a device, by which the device is named in full.

    Args:
        device: What PyTorch takes; None: where it creates tensors.

    Raises:
        ValueError: If there is no such device.
    """
    try:
        return torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError, OverflowError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device: expected a device that this PyTorch has, got {describe(device)}: {reason}"
        ) from error


def is_number(value: object) -> TypeGuard[float]:
    """Return whether the value is a number (a traced one counts, a bool doesn't)."""
    return isinstance(value, (int, float, torch.SymFloat)) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether the value is a number that float32 can hold; a traced one counts."""
    return is_number(value) and (
        isinstance(value, torch.SymFloat) or -MAX_NUMBER <= value <= MAX_NUMBER  # NaN is neither
    )


def is_dense(value: Tensor) -> bool:
    """Return whether a tensor has a number at each place of its shape, and strides."""
    return value.layout is torch.strided and not value.is_nested and not isinstance(value, MaskedTensor)


def is_readable(value: Tensor) -> bool:
    """Return whether values can be checked at no cost: on the CPU, where there are any."""
    return value.is_cpu and not torch.compiler.is_compiling() and not isinstance(value, FakeTensor)


def is_int(value: object) -> TypeGuard[int]:
    """Return whether the value is an integer (a traced one counts, a bool doesn't)."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def split_count(name: str, value: object, shapes: ShapeChecker) -> tuple[int, Tensor | None]:
    """Turn "an int, or one per sample" into the pair that the operators take.

    Args:
        name: Argument name, used in messages.
        value: Int, or int64 tensor [B].
        shapes: The call's shapes; ``B`` is already known.

    Returns:
        ``(count, counts)``: ``counts`` is the tensor or None, ``count`` is the int (0 beside a tensor).

    Raises:
        ValueError: If the value is neither, or a negative int.
    """
    if isinstance(value, Tensor):
        shapes.check(name, value, "B", (torch.int64,))
        return 0, value
    if not is_int(value):
        raise ValueError(f"{name}: expected an int or an int64 tensor [B], got {describe(value)}")
    if value < 0:
        raise ValueError(f"{name}: expected a count >= 0, got {describe_number(value)}")
    return value, None


def check_length(value: object, at_least: int, name: str = "length") -> None:
    """Check an explicit number of columns of a result.

    Raises:
        ValueError: If it isn't an int, less than ``at_least``, or more than ``MAX_LENGTH``.
    """
    if not is_int(value):
        raise ValueError(f"{name}: expected an int or None, got {describe(value)}")
    if value < at_least:
        raise ValueError(
            f"{name}: expected at least {describe_number(at_least)}, got {describe_number(value)}"
        )
    _check_not_absurd(name, value)


def _check_not_absurd(name: str, value: int) -> None:
    """Check that a number of columns is at most ``MAX_LENGTH``; not of a traced one, which nothing is known of."""
    if not torch.compiler.is_compiling() and value > MAX_LENGTH:
        raise ValueError(f"{name}: expected at most {MAX_LENGTH}, got {describe_number(value)}")


def width_of(name: str, count: int, counts: Tensor | None, length: int | None) -> int:
    """Number of columns of a result with ``count`` entries, or ``counts`` [B] of them by sample.

    Args:
        name: Argument name of the counts, used in messages.
        count: How many, beside a tensor the least that is known.
        counts: [B] int64, or None.
        length: What the caller asks for; None = ``count``, or the largest of ``counts``, which takes one read.

    Raises:
        ValueError: If ``length`` is less than ``count``, or missing where ``counts`` can't be read, or there would be
            more than ``MAX_LENGTH`` columns.
    """
    if length is not None:
        check_length(length, at_least=count)
        return length
    if counts is not None:
        count = read_max(counts, f"the number of columns depends on the values of {name}")
    _check_not_absurd(name, count)
    return count


def check_range(name: str, value: Tensor, low: int, high: int) -> None:
    """Check that every entry of a CPU tensor lies in ``low..high`` (both inclusive).

    Raises:
        ValueError: Naming the first offending value.
    """
    outside = (value < low) | (value > high)
    if bool(outside.any()):
        found = int(value[outside][0])
        raise ValueError(f"{name}: expected values in {low}..{high}, got {found}")


def check_counts(counts: Tensor, num_tokens: int, length: int) -> None:
    """Check the values of a count per sample, which only CPU tensors are checked for.

    Raises:
        ValueError: If one is negative, or more than the result has columns for.
    """
    if int(counts.min()) < 0:
        raise ValueError(f"k: expected counts >= 0, got {int(counts.min())}")
    largest = min(int(counts.max()), num_tokens)
    if largest > length:
        raise ValueError(f"length: expected at least the largest min(k, N), {largest}, got {length}")


def check_distinct(name: str, value: Tensor, num_rows: int) -> None:
    """Check that no sample of a CPU tensor [B, V], whose range is checked, names a position twice (filler aside).

    Raises:
        ValueError: Naming the first position that is there twice.
    """
    uses = value.new_zeros((value.shape[0], num_rows + 1))
    uses.scatter_add_(1, torch.where(value >= 0, value, num_rows), torch.ones_like(value))
    repeated = (uses[:, :num_rows] > 1).nonzero()
    if len(repeated):
        sample, position = repeated[0].tolist()
        raise ValueError(f"{name}: expected distinct positions, got {position} twice in sample {sample}")


def check_image_and_text(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> None:
    """Check what compares an image with the text beside it: [B, Q, C] float, and rows of it, [B, V] and [B, R] int64."""
    shapes = ShapeChecker()
    shapes.check("embeds", embeds, "B Q C", FLOAT_DTYPES)
    shapes.check("visual_index", visual_index, "B V", (torch.int64,))
    shapes.check("text_rows", text_rows, "B R", (torch.int64,))


def check_rows_of_both(embeds: Tensor, visual_index: Tensor, text_rows: Tensor) -> None:
    """Check on the CPU that ``embeds`` has the rows that are named; elsewhere it would need a read."""
    if embeds.is_cpu:
        check_range("visual_index", visual_index, -1, embeds.shape[1] - 1)
        check_range("text_rows", text_rows, -1, embeds.shape[1] - 1)


def read_max(counts: Tensor, reason: str) -> int:
    """Read the largest entry of an int64 tensor [B] to the host; 0 if it is empty.

    Args:
        counts: [B] int64.
        reason: What the value decides, for the message.

    Raises:
        ValueError: Where a host read isn't possible: while compiling, during CUDA graph capture, and of tensors that
            have no values.
    """
    if torch.compiler.is_compiling():
        raise ValueError(f"length: {reason}; pass length=... when compiling or exporting, got None")
    if counts.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"length: {reason}; pass length=... while capturing a CUDA graph, got None")
    if counts.is_meta or isinstance(counts, FakeTensor):
        raise ValueError(f"length: {reason}; pass length=... for tensors without values, got None")
    return int(counts.max()) if counts.numel() else 0
