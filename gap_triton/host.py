"""Handing values of the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ``values``, numbers in nested sequences or a tensor on the CPU, as a tensor on ``device``.

    ``torch.tensor(values, device=...)`` copies from memory that the GPU can't read by itself, and waits for all that was
    launched before. Here the copy is in the stream like any other work.
    """
    if device.type != "cuda":
        return torch.as_tensor(values).to(device)
    if torch.cuda.is_current_stream_capturing():
        # A graph would read the host's memory again at every replay; a fill holds its value itself.
        return _filled(torch.as_tensor(values), device)
    return torch.as_tensor(values).pin_memory().to(device, non_blocking=True)


def _filled(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    filled = torch.empty(values.numel(), dtype=values.dtype, device=device)
    for number, value in enumerate(values.flatten().tolist()):
        filled[number].fill_(value)
    return filled.view(values.shape)
