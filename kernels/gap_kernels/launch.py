"""Launching a kernel in little host time.

``kernel[grid](...)`` examines each argument at each call to find the compiled kernel that fits: for the forty arguments
of a large kernel that takes longer than the kernel runs. Here that is done once for each class of arguments, and the
compiled kernel is kept. The classes are those of Triton's specialisation: what a pointer points to, and whether pointers
and strides are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from .backends import triton_is_interpreted

_compiled: dict[tuple[Any, ...], Any] = {}

OF_NVIDIA = ("maxnreg", "ptx_options")
"""Options that no other compiler takes."""


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    strides: Sequence[int],
    sizes: Sequence[int],
    factors: Sequence[float],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """Launch a kernel on the device and the current stream of its tensors.

    The kernel's parameters come in the order of the arguments here.

    Args:
        kernel: A function under ``triton.jit``.
        grid: One to three sizes.
        tensors: Pointers; the first isn't None.
        strides: Integers that Triton specialises on.
        sizes: Integers in the kernel's ``do_not_specialize``.
        factors: Floats.
        constants: The kernel's ``tl.constexpr`` parameters by name, in their order.
        **options: Of the compiler: ``num_warps``, ``num_stages``, ``launch_cooperative_grid``; and of NVIDIA's alone
            ``maxnreg``, the most registers of a thread, and ``ptx_options``, of its assembler.
    """
    first = tensors[0]
    assert first is not None
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            launch(kernel, grid, tensors, strides, sizes, factors, constants, **options)
        return
    arguments = (*tensors, *strides, *sizes, *factors)
    # On AMD the class of a pointer depends on the size of its tensor, too.
    if triton_is_interpreted() or torch.version.hip:
        options = {name: value for name, value in options.items() if name not in OF_NVIDIA}
        kernel[grid](*arguments, **constants, **options)
        return
    key = (
        id(kernel),
        first.device,
        tuple([None if tensor is None else tensor.dtype for tensor in tensors]),
        _classes([0 if tensor is None else tensor.data_ptr() for tensor in tensors], 1 << 64),
        _classes(strides, 1 << 31),
        None if max(sizes, default=0) < 1 << 31 else tuple([size >> 31 for size in sizes]),
        *constants.values(),
        *options.items(),
    )
    compiled = _compiled.get(key)
    if compiled is None:
        # Below they are handed over by position.
        assert list(kernel.arg_names[len(arguments) :]) == list(constants)
        compiled = kernel[grid](*arguments, **constants, **options)
        if compiled is not None:
            _compiled[key] = compiled
        return
    width = (*grid, 1, 1)[:3]
    compiled[width](*arguments, *constants.values())


def _classes(values: Sequence[int], limit: int) -> tuple[int, ...] | None:
    """Return how Triton specialises on each integer; None in the usual case that all are multiples of 16."""
    merged = reduce(or_, values, 0)
    if not merged & 15 and 0 <= merged < limit:
        return None
    # 0 to 3 by alignment and width, and 4 for what becomes a constant of the kernel.
    return tuple([4 if value == 1 else 2 * (value >= limit) + (value & 15 == 0) for value in values])


# Triton's functions of these names also take compile-time constants, and need several microseconds a call for it.
def cdiv(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()
