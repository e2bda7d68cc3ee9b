"""Constants that stay on a device for later calls."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Constants:
    """Keeps what was made for a key, the least recently used go first.

    Tensors that are made while operators are traced (``torch.compile``, fake tensors) are not kept, and none that are kept
    are used with fake ones. A copy or a pickle is empty.

    Args:
        size: How many values to keep.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[tuple[Hashable, int | None], object] = OrderedDict()
        self._lock = threading.RLock()
        self._captured: list[object] = []

    def __reduce__(self) -> tuple[type[Constants], tuple[int]]:
        return Constants, (self.size,)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything but what a CUDA graph may still read."""
        with self._lock:
            self._kept.clear()

    def get(self, key: Hashable, device: torch.device | None, make: Callable[[], T]) -> T:
        """Return what ``make()`` returned for ``key``, whose tensors are to lie on ``device``; None = it has no tensors.

        Each stream has its own, since one may not have made yet what another asks for.

        Raises:
            RuntimeError: A CUDA graph is captured, and nothing is kept for ``key``: copies from the host, made meanwhile,
                would be repeated at each replay, from memory that is gone by then.
        """
        if torch.compiler.is_compiling():  # which can't trace a lock
            found = self._of_any_stream(key)
            return make() if found is None else found  # type: ignore[return-value]
        if device is None:
            return self._get((key, None), make)
        probe = torch.empty(0, device=device)
        if type(probe) is not Tensor:
            return make()
        if not probe.is_cuda:
            return self._get((key, None), make)
        if not torch.cuda.is_current_stream_capturing():
            return self._get((key, torch.cuda.current_stream(device).cuda_stream), make)
        with self._lock:
            value = self._of_any_stream(key)
        if value is None:
            raise RuntimeError("run a prompt of the same sizes once before a CUDA graph is captured")
        self._captured.append(value)  # a graph reads its memory for as long as it is replayed
        return value  # type: ignore[return-value]

    def _of_any_stream(self, key: Hashable) -> object | None:
        for (known, _), value in self._kept.items():
            if known == key:
                return value
        return None

    def _get(self, key: tuple[Hashable, int | None], make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]  # type: ignore[return-value]
            # Made in inference mode, it could not be saved for a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                value = make()
            self._kept[key] = value
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
            return value
