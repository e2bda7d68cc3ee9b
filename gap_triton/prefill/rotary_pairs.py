"""Which channels a model's rotary embedding turns, and by what: found by running it on numbers that tell."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..constants import Constants
from ..host import to_device

Sections = tuple[int, ...] | None

TOLERANCE = 1e-4
"""Of numbers of about 1 in float32, which some models round to a narrower type and back."""
_ON_DEVICE = Constants(64)
# By function, sections and sizes. Functions can't be run while a graph is captured, so a prefill before that fills it.
_known: dict[tuple[Any, ...], np.ndarray | None] = {}


def pairs_of(rotation: Any, sections: Sections, head_dim: int, cos: Tensor) -> Tensor | None:
    """Return the pairs of channels that a model's rotation turns, as `gap_kernels.unrotate` takes them: [2, D] int32.

    Args:
        rotation: The function, see `rotate`.
        sections: What it is told besides.
        head_dim: D.
        cos: [B, S, F] or [A, B, S, F], for its sizes and device.

    Returns:
        The pairs, on the device of ``cos``; None where it does something else than turn pairs, or that is not known while a
        graph is captured or traced.
    """
    if cos.dim() not in (3, 4):
        return None
    key = (rotation, sections, head_dim, cos.shape[0] if cos.dim() == 4 else None, cos.shape[-1])
    if key not in _known:
        if _is_traced(cos):
            return None
        with torch.inference_mode(False), torch.no_grad():
            found = _find(*key)
        _known[key] = None if found is None else found.numpy()
    pairs = _known[key]
    if pairs is None:
        return None
    return _ON_DEVICE.get(
        (key, cos.device), cos.device, lambda: to_device(torch.from_numpy(pairs), cos.device)
    )


def rotate(
    rotation: Any, sections: Sections, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate [B, H, S, D] by a model's own function, which takes queries and keys, or one of them, and then cos and sin."""
    if list(inspect.signature(rotation).parameters)[1] == "cos":  # one tensor at a time
        return rotation(query, cos, sin), rotation(key, cos, sin)
    query, key = rotation(query, key, cos, sin, *(() if sections is None else (list(sections),)))
    return query, key


def _is_traced(cos: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
        return True
    return cos.is_cuda and torch.cuda.is_current_stream_capturing()


def _find(rotation: Any, sections: Sections, head_dim: int, axes: int | None, width: int) -> Tensor | None:
    """[2, D] int32 on the CPU; None where the function does something else, or does not run there."""
    shape = (1, 1, width) if axes is None else (axes, 1, 1, width)
    zeros, ones = torch.zeros(shape), torch.ones(shape)
    every = torch.ones(1, 1, 1, head_dim)
    channel = torch.arange(head_dim)
    # A column tells its number, from 2 on; what is not turned stays 1.
    columns = (torch.arange(zeros.numel(), dtype=torch.float32) + 2).view(shape)
    try:
        column = rotate(rotation, sections, every, every, columns, zeros)[0].flatten().round().long() - 2
        # Turned by a quarter, a channel has the number of the other one, counted from 1, the first of a pair its negative.
        numbers = (channel + 1.0).view(1, 1, 1, -1)
        quarter = rotate(rotation, sections, numbers, numbers, zeros, ones)[0].flatten().round().long()
        turned = column >= 0
        other = torch.where(turned, quarter.abs() - 1, channel)
        pairs = torch.stack([other, torch.where(turned, column, -1)])
        if bool((pairs >= torch.tensor([[head_dim], [zeros.numel()]])).any() or (other < 0).any()):
            return None
        return pairs.int() if _agrees(rotation, sections, pairs, shape) else None
    except Exception:  # whatever a model's function can't take: then it is run on what the model gives it
        return None


def _agrees(rotation: Any, sections: Sections, pairs: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the function turns these pairs, and does nothing else, on random numbers of several rows."""
    generator = torch.Generator().manual_seed(0)
    (other, column), rows = pairs, (*shape[:-2], 3, shape[-1])
    query, key = (torch.randn(1, heads, 3, len(other), generator=generator) for heads in (2, 1))
    cos, sin = (torch.rand(rows, generator=generator) for _ in range(2))
    by_channel = [
        (each if each.dim() == 3 else each.movedim(0, 2).flatten(2))[:, None] for each in (cos, sin)
    ]
    c, s = (
        torch.where(column >= 0, each[..., column.clamp(min=0)], fill)
        for each, fill in zip(by_channel, (1.0, 0.0), strict=True)
    )
    s = torch.where(other > torch.arange(len(other)), -s, s)
    found = rotate(rotation, sections, query, key, cos, sin)
    return all(
        torch.allclose(one, before * c + before[..., other] * s, rtol=TOLERANCE, atol=TOLERANCE)
        for one, before in zip(found, (query, key), strict=True)
    )
