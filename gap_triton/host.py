"""Handing values of the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def to_device(values: Any, device: torch.device) -> torch.Tensor:
    """Return ``values``, numbers in nested sequences or a tensor on the CPU, as a tensor on ``device``.

    ``torch.tensor(values, device=...)`` copies from memory that a GPU can't read by itself, and waits for all that was
    launched before. Here the copy is in the stream like any other work. A graph would read the host's memory again at every
    replay, so while one is captured numbers are filled in.
    """
    if device.type != "cuda":
        return torch.as_tensor(values).to(device)
    if isinstance(values, torch.Tensor):
        return _pinned(values).to(device, non_blocking=True)
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        numbers = [torch.full((), number, device=device) for number in _numbers_in(values)]
        return torch.stack(numbers).view(_shape_of(values))
    return _pinned(torch.tensor(values)).to(device, non_blocking=True)


def _pinned(values: torch.Tensor) -> torch.Tensor:
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)


def _numbers_in(values: Any) -> Iterator[int | float | bool]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _numbers_in(value)
        else:
            yield value


def _shape_of(values: Any) -> list[int]:
    return [len(values), *_shape_of(values[0])] if isinstance(values, (list, tuple)) else []
