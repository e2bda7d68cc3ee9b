"""The few things that are done differently on a CUDA device, so that the rest runs on a CPU as well."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from bench.outcome import NotAvailable


class NeedsCuda(NotAvailable):
    """Raised by what has no counterpart on a CPU."""


def is_cuda(device: torch.device) -> bool:
    """Whether streams, graphs and events exist on ``device``."""
    return device.type == "cuda"


def require_cuda(device: torch.device, what: str) -> None:
    """Raise `NeedsCuda` unless ``device`` is one."""
    if not is_cuda(device):
        raise NeedsCuda(f"{what} needs CUDA, this is {device}")


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Hand unused memory back."""
    if is_cuda(device):
        torch.cuda.empty_cache()


def stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of its own; on a CPU there is none."""
    return torch.cuda.Stream(device) if is_cuda(device) else None


def new_stream(device: torch.device) -> AbstractContextManager[object]:
    """A context whose work goes to a stream of its own; on a CPU, nothing."""
    return on_stream(stream(device))


def on_stream(chosen: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """A context whose work goes to a stream; None: to that which is current."""
    return nullcontext() if chosen is None else torch.cuda.stream(chosen)


def memory_bytes(device: torch.device) -> int:
    """Free memory of a GPU, counting what PyTorch holds unused; a fixed, small share of a CPU's."""
    if not is_cuda(device):
        return 2**30
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache; 0 on a CPU, where one set of inputs is timed."""
    return torch.cuda.get_device_properties(device).L2_cache_size if is_cuda(device) else 0


def capture(function: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """`gap_triton.latency.graphs.capture`, or `NeedsCuda`."""
    require_cuda(device, "a CUDA graph")
    # Imports transformers, which takes seconds: most steps capture nothing.
    from gap_triton.latency.graphs import capture as captured

    return captured(function, device)
