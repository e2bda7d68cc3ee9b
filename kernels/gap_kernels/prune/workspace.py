"""Counters for kernels whose programs wait for one another: zero before a launch, and left at zero by it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SLAB = 1 << 18
"""Counters set to zero at once for all graphs of a device, 1 MiB."""

_lock = threading.Lock()
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_unused: dict[torch.device, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Return at least ``count`` int32 zeros that no launch on another stream, or in another CUDA graph, uses.

    Launches on one stream follow one another and share their counters. A graph gets its own, as it may be replayed on
    any stream. They come from memory that was set to zero before, so that the graph has no node for it; only if there
    is none left, a graph clears its own at each replay.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            taken = _take(device, count)
        return torch.zeros(count, dtype=torch.int32, device=device) if taken is None else taken
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _of_stream.get(key)
    if held is None or held.numel() < count:
        with _lock:
            _of_stream[key] = held = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
            if device not in _unused:
                _unused[device] = torch.zeros(SLAB, dtype=torch.int32, device=device)
                torch.cuda.current_stream(device).synchronize()  # once: a graph may be replayed on any stream
    return held


def _take(device: torch.device, count: int) -> Tensor | None:
    slab = _unused.get(device)
    if slab is None or slab.numel() < count:
        return None
    _unused[device] = slab[count:]
    return slab[:count]
