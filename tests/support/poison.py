"""What memory holds before a kernel writes to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_memory(device: str) -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN (integers: the largest) inside of the block, on any device.

    An output element that no kernel writes can't pass for a result then.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # Warnings only: on a GPU some operators of PyTorch that tests use have no deterministic way.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=device).isnan().all()
        assert (torch.empty(3, dtype=torch.int64, device=device) == torch.iinfo(torch.int64).max).all()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
