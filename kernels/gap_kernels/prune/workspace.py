"""Counters for kernels whose programs wait for one another: zero before a launch, and left at zero by it.

They are parts of a slab that was set to zero once, so that no launch has to clear its own. Two launches that may run at the
same time never share them:

- launches on one stream follow one another, and share what is the stream's;
- a CUDA graph has its own, as it may be replayed on any stream;
- a launch on a stream that PyTorch didn't make has its own. Whoever made such a stream may destroy it with work in flight,
  and the next one may then have its handle, by which alone it is known here.

A slab outlives every call, so that it is memory of its own kind: see ``long_lived.py``.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..launch import cdiv, next_power_of_2
from ..long_lived import make_to_keep

SLAB = 1 << 18
"""Counters set to zero at once, 1 MiB."""
MOST_OF_STREAM = 1 << 16
"""Counters that a stream may keep; a launch that needs more clears its own."""
LEAST_OF_STREAM = 1024
LINE = 32
"""Counters of 128 bytes: parts begin at whole lines, so that their addresses are as aligned as any tensor's."""

_lock = threading.Lock()
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_unused: dict[torch.device, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Return at least ``count`` int32 zeros that no launch uses at the same time as one on the current stream of ``device``.

    Where nothing kept can be had they are cleared on that stream, by a launch more: in a graph that is captured before
    anything has run on its device, on streams that PyTorch didn't make, and for very large batches.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return counters(device, count)
    if torch.cuda.is_current_stream_capturing():
        held = _take(device, count, may_make=False)
    else:
        held = _of_current_stream(device, count)
    return torch.zeros(count, dtype=torch.int32, device=device) if held is None else held


def _of_current_stream(device: torch.device, count: int) -> Tensor | None:
    """Return what the current stream keeps for its launches; None if it may keep nothing, or not as much."""
    stream = torch.cuda.current_stream(device)
    if count > MOST_OF_STREAM or stream.stream_id == stream.cuda_stream != 0:  # known by its handle alone
        return None
    key = (device, stream.cuda_stream)
    held = _of_stream.get(key)
    if held is None or held.numel() < count:
        held = _take(device, max(next_power_of_2(count), LEAST_OF_STREAM), may_make=True)
        if held is not None:
            _of_stream[key] = held
    return held


def _take(device: torch.device, count: int, *, may_make: bool) -> Tensor | None:
    """Take unused counters for good; None if there are none left and none may be made, as during a capture."""
    size = cdiv(count, LINE) * LINE
    with _lock:
        slab = _unused.get(device)
        if may_make and (slab is None or slab.numel() < size):
            slab = make_to_keep(device, lambda: torch.zeros(SLAB, dtype=torch.int32, device=device))
        if slab is None or slab.numel() < size:
            return None
        _unused[device] = slab[size:]
        return slab[:size]
