"""Values of the host on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return ints as [N] int64, or a tensor of the host, on ``device``; the host does not wait for it.

    ``torch.tensor(values, device=...)`` copies from memory that may be paged out, and so waits for the stream.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
