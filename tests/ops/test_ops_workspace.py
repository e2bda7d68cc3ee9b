"""Counters of waiting kernels: who shares them, and what memory they are. CUDA's API is a stand-in here."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from gap_kernels import long_lived
from gap_kernels.prune import workspace
from gap_kernels.prune.workspace import counters
from torch import Tensor

pytest.importorskip("triton")

DEVICE = torch.device("cuda", 0)
PLAIN, EXTERNAL = 0x7F00_0000_1000, 0x7F00_0000_2000
"""Handles of streams."""


class Stream:
    """What is asked of a stream; the id of one that PyTorch didn't make is its handle."""

    def __init__(self, handle: int, stream_id: int, capturing: bool = False) -> None:
        self.cuda_stream, self.stream_id, self.capturing = handle, stream_id, capturing

    def synchronize(self) -> None:
        assert not self.capturing
        Cuda.check_thread()


class Cuda:
    """Stands for what PyTorch and CUDA know of each thread, and for the memory pool of cudagraph-trees."""

    relaxed: ClassVar[dict[int, bool]] = {}
    others_capture = False

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.devices: dict[int, int] = {}
        self.pool_of: int | None = None  # the thread whose allocations go to the pool
        self.in_pool: list[weakref.ref[Tensor]] = []
        self.zeroed = 0
        self.turn: list[Stream] = []
        Cuda.relaxed, Cuda.others_capture = {}, False

    @staticmethod
    def check_thread() -> None:
        """In CUDA's global mode, some calls of one thread are errors while another one captures."""
        assert not Cuda.others_capture or Cuda.relaxed.get(threading.get_ident()), "ended another capture"

    @property
    def stream(self) -> Stream:
        return self.streams.get(threading.get_ident(), DEFAULT)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        thread, before = threading.get_ident(), self.stream
        self.streams[thread] = stream
        yield
        self.streams[thread] = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        thread = threading.get_ident()
        before = self.devices.get(thread, 0)
        self.devices[thread] = device.index
        yield
        self.devices[thread] = before

    def zeros(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.check_thread()
        made = torch.full(size, 0, dtype=dtype)
        if self.pool_of == threading.get_ident():
            self.in_pool.append(weakref.ref(made))
        self.zeroed += 1
        return made

    def check_memory_pool(self) -> None:
        """As cudagraph-trees does, for a function without outputs."""
        alive = sum(reference() is not None for reference in self.in_pool)
        if alive:
            raise RuntimeError(f"Detected {alive} tensor(s) in the cudagraph pool not tracked as outputs.")

    def new_stream(self, device: torch.device) -> Stream:
        return self.turn.pop(0) if self.turn else Stream(PLAIN + 8, 35)


DEFAULT = Stream(0, 0)


class Driver:
    @staticmethod
    def cuThreadExchangeStreamCaptureMode(mode: Any) -> int:
        Cuda.relaxed[threading.get_ident()] = mode._obj.value == 2
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.stream.capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.devices.get(threading.get_ident(), 0))
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(torch.cuda, "stream", fake.on)
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch, "zeros", fake.zeros)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver)
    monkeypatch.setattr(workspace, "_of_stream", {})
    monkeypatch.setattr(workspace, "_unused", {})
    return fake


def test_nothing_is_left_in_the_pool_of_a_caller(cuda: Cuda) -> None:
    """What ``torch.compile(mode="reduce-overhead")`` checks after a warm-up."""
    cuda.pool_of = threading.get_ident()
    with cuda.on(Stream(PLAIN, 3)):
        counters(DEVICE, 5)
    cuda.check_memory_pool()


def test_the_check_of_the_pool_sees_what_is_left(cuda: Cuda) -> None:
    cuda.pool_of = threading.get_ident()
    left = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"Detected 1 tensor\(s\) in the cudagraph pool"):
        cuda.check_memory_pool()
    del left
    cuda.check_memory_pool()


def test_the_capture_of_another_thread_goes_on(cuda: Cuda) -> None:
    Cuda.others_capture = True
    cuda.turn = [Stream(PLAIN + 8, 3, capturing=True), Stream(PLAIN + 16, 5)]  # the first is that thread's
    assert counters(DEVICE, 5).tolist() == [0] * workspace.LEAST_OF_STREAM
    assert cuda.turn == []
    assert threading.get_ident() not in Cuda.relaxed  # what the caller may do is as before


def test_no_stream_is_free_of_captures(cuda: Cuda) -> None:
    cuda.turn = [Stream(PLAIN, 3, capturing=True)] * long_lived.STREAMS
    with pytest.raises(RuntimeError, match="all 32 streams of cuda:0 are capturing"):
        counters(DEVICE, 5)


def test_launches_on_a_stream_share_what_was_cleared_once(cuda: Cuda) -> None:
    first, again = counters(DEVICE, 5), counters(DEVICE, 900)
    assert first.data_ptr() == again.data_ptr()
    with cuda.on(Stream(PLAIN, 3)):
        other = counters(DEVICE, 5)
    assert other.data_ptr() not in places(first)
    assert cuda.zeroed == 1


def places(held: Tensor) -> range:
    """Addresses of counters."""
    return range(held.data_ptr(), held.data_ptr() + held.numel() * held.element_size())


def test_a_stream_that_needs_more_gets_more(cuda: Cuda) -> None:
    small, large = counters(DEVICE, 5), counters(DEVICE, 5000)
    assert large.numel() >= 5000
    assert large.data_ptr() not in places(small)  # which a launch may still use
    assert counters(DEVICE, 6).data_ptr() == large.data_ptr()


def test_streams_made_elsewhere_share_nothing(cuda: Cuda) -> None:
    """One may be destroyed with work in flight, and the next then has its handle."""
    with cuda.on(Stream(EXTERNAL, EXTERNAL)):
        first = counters(DEVICE, 5)
    with cuda.on(Stream(EXTERNAL, EXTERNAL)):
        second = counters(DEVICE, 5)
    assert first.data_ptr() != second.data_ptr()
    assert workspace._of_stream == {}


def test_each_graph_has_its_own(cuda: Cuda) -> None:
    with cuda.on(Stream(PLAIN, 3, capturing=True)):
        cleared = counters(DEVICE, 5)  # in the graph: nothing has run before
        assert cuda.zeroed == 1
    eager = counters(DEVICE, 5)
    with cuda.on(Stream(PLAIN, 3, capturing=True)):
        graphs = [counters(DEVICE, count) for count in (5, 33, 5)]
    assert cuda.zeroed == 2
    used = [cleared, eager, *graphs]
    for one in used:
        assert not any(other.data_ptr() in places(one) for other in used if other is not one)
    # Or a graph would be captured with a kernel that isn't compiled yet, for pointers of another alignment.
    assert len({held.data_ptr() % 128 for held in (eager, *graphs)}) == 1


def test_a_graph_clears_its_own_where_nothing_is_left(cuda: Cuda) -> None:
    counters(DEVICE, 5)
    with cuda.on(Stream(PLAIN, 3, capturing=True)):
        counters(DEVICE, workspace.SLAB)
    assert cuda.zeroed == 2


def test_streams_get_more_where_nothing_is_left(cuda: Cuda) -> None:
    held = []
    for number in range(5):
        with cuda.on(Stream(PLAIN + 8 * number, 1 + 2 * number)):
            held.append(counters(DEVICE, workspace.MOST_OF_STREAM))
    assert cuda.zeroed == 2
    assert len({each.data_ptr() for each in held}) == 5


def test_a_launch_that_needs_very_many_clears_its_own(cuda: Cuda) -> None:
    counters(DEVICE, 5)
    count = workspace.MOST_OF_STREAM + 1
    assert counters(DEVICE, count).numel() == count
    assert counters(DEVICE, 5).numel() == workspace.LEAST_OF_STREAM


def test_the_device_of_the_tensors_counts(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its stream is being captured, whatever the current device."""
    asked = []

    def capturing() -> bool:
        asked.append(torch.cuda.current_device())
        return False

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
    counters(torch.device("cuda", 1), 5)
    assert set(asked) == {1}
    assert torch.cuda.current_device() == 0


def test_on_the_cpu_each_call_has_its_own() -> None:
    first, second = counters(torch.device("cpu"), 5), counters(torch.device("cpu"), 5)
    assert first.dtype == torch.int32
    assert first.tolist() == [0] * 5
    assert first.data_ptr() != second.data_ptr()
