"""What a model's rotary embedding does to vectors of ones, as ``gap_kernels.corrected_importance`` takes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ..constants import Constants
from ..host import to_device
from .rotary_pairs import pairs_on_host
from .unrotated import cos_and_sin, rotation_with

SCORE = "raters_corrected"
_TURNS = Constants(16)


class Rope(NamedTuple):
    """How rows are turned, see `gap_kernels.corrected_importance`.

    Attributes:
        cos: [B, S, E].
        sin: [B, S, E].
        turns: [D] int64.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    turns: torch.Tensor


def rope_of(module: Any, rotary: Any, query: torch.Tensor) -> Rope | None:
    """Return how the attention ``module`` turned the rows of ``query`` [B, H, S, D] by ``rotary``, cos and sin.

    Returns:
        None where no ``turns`` say it; see `unrotated.rotated_ones` then.

    Raises:
        ValueError: The model has no such function, or rotates by something else than one cos and sin for all heads.
    """
    cos, sin = cos_and_sin(module, rotary, query, SCORE)
    (rotation, sections), channels, head_dim = rotation_with(module), cos.shape[-1], query.shape[-1]
    turns = _turns(rotation, sections, head_dim, channels) if cos.dim() == 3 else None
    if turns is None:
        return None
    device, batch = query.device, query.shape[0]
    on_device = _TURNS.get((rotation, channels, head_dim, device), device, lambda: to_device(turns, device))
    return Rope(cos.expand(batch, -1, -1), sin.expand(batch, -1, -1), on_device)


def _turns(rotation: Any, sections: tuple[int, ...] | None, head_dim: int, channels: int) -> list[int] | None:
    """Return what a model's rotation makes of a 1 in each channel of a head, by the pairs that it turns."""
    pairs = None if sections is not None else pairs_on_host(rotation, None, head_dim, None, channels)
    if pairs is None:
        return None  # it takes cos and sin of several axes, or turns no pairs
    other, column = pairs
    signs = np.where(other > np.arange(head_dim), -1, 1)
    return np.where(column < 0, 0, (column + 1) * signs).tolist()
