"""Position ids in a pipeline: its later ranks never see what an encoder puts out, so ids go with the hidden states."""

from __future__ import annotations

from typing import Any

import torch

from .positions import AXES

IDS = "gap_position_ids"
"""Among the intermediate tensors: [tokens, 3] int64."""


def send_ids(model: Any) -> None:
    """Let the empty intermediate tensors of ``model``, into which a rank receives, have room for ids."""
    make = model.make_empty_intermediate_tensors

    def with_ids(batch_size: int, dtype: torch.dtype, device: torch.device) -> Any:
        empty = make(batch_size, dtype, device)
        empty.tensors[IDS] = torch.zeros(batch_size, AXES, dtype=torch.int64, device=device)
        return empty

    model.make_empty_intermediate_tensors = with_ids
