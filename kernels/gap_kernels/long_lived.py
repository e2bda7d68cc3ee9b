"""Memory of a GPU that outlives the call that needs it first, and belongs to no pool and no CUDA graph.

PyTorch takes memory from wherever the caller was told to: ``torch.compile(mode="reduce-overhead")`` runs a function inside a
memory pool of its graphs before it records it, and raises if anything but the function's outputs is alive there afterwards;
``torch.cuda.use_mem_pool`` does the same to any code; and memory that is allocated during a capture is the graph's. There is
nothing to ask whether a pool is in use, but each is bound to a thread or a stream: a pool takes what its own thread
allocates (``_cuda_beginAllocateCurrentThreadToPool``, torch 2.9 to 2.13), a capture what is allocated on its stream. So what
is to be kept is made by a thread of its own, on a stream of its own.

Another thread may be capturing a graph in CUDA's global mode. For any thread in a stricter mode than "relaxed", allocating
memory or waiting for a stream is then an error, which also ends that capture. The thread is in relaxed mode meanwhile: what
it does has nothing to do with the captured stream.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

CAPTURE_MODE_RELAXED = 2
"""``CU_STREAM_CAPTURE_MODE_RELAXED`` of the CUDA driver API."""
STREAMS = 32
"""PyTorch has that many streams for a device, and gives them out in turns."""


def make_to_keep(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """Return what ``make`` creates on a CUDA device, once it is complete for whatever stream uses it.

    Args:
        device: With its index.
        make: Runs in another thread, with ``device`` and a stream of it as the current ones. It must allocate what it
            returns, and wait for no other stream.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_make, device, make).result()


def _make(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    _allow_all_while_others_capture()  # for the rest of this thread, which ends with this function
    with torch.cuda.device(device):
        stream = _stream_outside_of_captures(device)
        with torch.cuda.stream(stream):
            made = make()
        stream.synchronize()
    return made


def _allow_all_while_others_capture() -> None:
    """Put this thread into the relaxed mode, for which PyTorch has no function."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:  # not NVIDIA's: a capture of another thread then ends with an error of its own
        return
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(CAPTURE_MODE_RELAXED)))


def _stream_outside_of_captures(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that nobody captures on; as they come in turns, a new one may be the one of another thread."""
    for _ in range(STREAMS):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            if not torch.cuda.is_current_stream_capturing():
                return stream
    raise RuntimeError(f"all {STREAMS} streams of {device} are capturing CUDA graphs")
