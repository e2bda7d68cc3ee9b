"""Counting what a call asks of a device: launches, and waits of the host for it.

On a GPU both are observed: launches by the profiler, waits by PyTorch's warnings about synchronisation. On a CPU, where
nothing is launched and nobody waits, the operators are counted that would launch a kernel, read a value or copy a list to
a GPU.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read values on the host, or whose result has a size that depends on values.
READING = frozenset(
    {
        "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2",
        "unique_consecutive", "repeat_interleave",
    }
)  # fmt: skip
# Operators that only describe memory anew, or reserve it.
WITHOUT_A_LAUNCH = frozenset(
    {
        "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "transpose", "permute", "t", "slice", "select",
        "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "split", "split_with_sizes", "narrow", "diagonal",
        "unflatten", "chunk", "unfold", "view_as_real", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided",
        "new_empty_strided", "sym_size", "is_same_size", "_local_scalar_dense",
    }
)  # fmt: skip
# Functions of Python that read a tensor's values, and those that make a tensor of values that the host has.
READING_FUNCTIONS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)
COPYING_FUNCTIONS = (torch.tensor, torch.as_tensor)


@dataclass
class Counts:
    """What one call asks of a device.

    Attributes:
        launches: Kernels, copies and fills.
        reads: Times that the host waits for a value of the device. On a GPU, where the two can't be told apart, copies are
            among them.
        copies: Times that the host waits until values of its own, such as those of a list, are on the device.
        operators: The operators that launch, by their name; on a CPU.
    """

    launches: int = 0
    reads: int = 0
    copies: int = 0
    operators: Counter[str] = field(default_factory=Counter)

    @property
    def syncs(self) -> int:
        """How often the host waits."""
        return self.reads + self.copies


def count(function: Callable[[], object], device: torch.device) -> Counts:
    """Run ``function`` and count what it asks of ``device``; on a GPU it is run twice, once for each count."""
    if device.type != "cuda":
        counts = Counts()
        with _FunctionsThatWait(counts), _Operators(counts):
            function()
        return counts
    return Counts(launches=_launches_on_cuda(function, device), reads=_waits_on_cuda(function))


class _Operators(TorchDispatchMode):
    """Counts operators, views excepted. An operator of `gap_kernels` is one launch, whatever its reference does inside."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in WITHOUT_A_LAUNCH:
            self.counts.launches += 1
            self.counts.operators[name] += 1
        reads = name in READING and func is not torch.ops.aten.repeat_interleave.self_int
        if reads or _indexed_by_a_mask(name, args):
            self.counts.reads += 1
        return func(*args, **(kwargs or {}))


def _indexed_by_a_mask(name: str, args: Any) -> bool:
    """Return whether an index is a mask, whose true elements must be counted before the result has a size."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])


class _FunctionsThatWait(TorchFunctionMode):
    """Counts what no operator shows on a CPU: values that Python reads at once, and values that it puts into a tensor."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READING_FUNCTIONS:
            self.counts.reads += 1
        elif func in COPYING_FUNCTIONS and kwargs.get("device") is not None:
            self.counts.copies += not isinstance(args[0], torch.Tensor)
        return func(*args, **kwargs)


def _launches_on_cuda(function: Callable[[], object], device: torch.device) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize(device)
    on_device = [event for event in profile.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device)


def _waits_on_cuda(function: Callable[[], object]) -> int:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(each.message) for each in caught)
