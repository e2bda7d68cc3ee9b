"""Which channels a model's rotary embedding turns, and by what: found by running it on numbers that tell."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..constants import Constants
from ..host import to_device

Sections = tuple[int, ...] | None
Key = tuple[Any, Sections, int, int | None, int]
"""The function, what it is told besides, D, A and F as in `pairs_of`."""

TOLERANCE = 1e-4
"""Of numbers of about 1 in float32, which some models round to a narrower type and back."""
_ON_DEVICE = Constants(64)
# Nothing can be tried out while a graph is compiled.
_known: dict[Key, np.ndarray | None] = {}


def pairs_of(rotation: Any, sections: Sections, head_dim: int, cos: Tensor) -> Tensor | None:
    """Return the pairs of channels that a model's rotation turns, as `gap_kernels.unrotate` takes them: [2, D] int32.

    Args:
        rotation: The function, see `rotate`.
        sections: What it is told besides.
        head_dim: D.
        cos: [B, S, F] or [A, B, S, F], for its sizes and device.

    Returns:
        The pairs, on the device of ``cos``; None where it does something else than turn pairs, or that is not known while a
        graph is compiled.
    """
    if cos.dim() not in (3, 4):
        return None
    axes = cos.shape[0] if cos.dim() == 4 else None
    key, device = (rotation, sections, head_dim, axes, cos.shape[-1]), cos.device
    pairs = pairs_on_host(*key)
    if pairs is None:
        return None
    return _ON_DEVICE.get((key, device), device, lambda: to_device(torch.from_numpy(pairs), device))


def pairs_on_host(
    rotation: Any, sections: Sections, head_dim: int, axes: int | None, width: int
) -> np.ndarray | None:
    """Return the pairs as `pairs_of` does, [2, D] int32, in memory of the host; A = ``axes`` and F = ``width``."""
    key = (rotation, sections, head_dim, axes, width)
    if key not in _known:
        if torch.compiler.is_compiling():
            return None
        # Real numbers also while operators are traced.
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            found = _find(*key)
            _known[key] = None if found is None else found.numpy()
    return _known[key]


def takes_heads(rotation: Any, sections: Sections, head_dim: int, cos: Tensor, sin: Tensor) -> bool:
    """Return whether a model's function rotates whole heads; elsewhere attentions hand it a part that they choose.

    Args:
        rotation: The function, see `rotate`.
        sections: What it is told besides.
        head_dim: D.
        cos: [1, 1, F] or [A, 1, 1, F], on the CPU.
        sin: Likewise.
    """
    ones = torch.ones(1, 1, 1, head_dim, device=cos.device, dtype=torch.float32)
    try:
        return all(x.shape == ones.shape for x in rotate(rotation, sections, ones, ones, cos, sin))
    except Exception:  # whatever its code says of the wrong size
        return False


def has_one_angle(rotation: Any, sections: Sections, head_dim: int, cos: Tensor, sin: Tensor) -> bool:
    """Return whether both channels of each pair are turned by the same cos and sin; arguments as in `takes_heads`.

    True also where the function does not turn pairs that are known.
    """
    pairs = pairs_on_host(
        rotation, sections, head_dim, cos.shape[0] if cos.dim() == 4 else None, cos.shape[-1]
    )
    if pairs is None:
        return True
    other, column = torch.from_numpy(pairs).long()
    own, others = column[column >= 0], column[other][column >= 0]
    return all(torch.equal(x.flatten()[own], x.flatten()[others]) for x in (cos, sin))


def rotate(
    rotation: Any, sections: Sections, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate [B, H, S, D] by a model's own function, which takes queries and keys, or one of them, and then cos and sin."""
    if list(inspect.signature(rotation).parameters)[1] == "cos":  # one tensor at a time
        return rotation(query, cos, sin), rotation(key, cos, sin)
    query, key = rotation(query, key, cos, sin, *(() if sections is None else (list(sections),)))
    return query, key


def _find(rotation: Any, sections: Sections, head_dim: int, axes: int | None, width: int) -> Tensor | None:
    """[2, D] int32 on the CPU; None where the function does something else, or does not run there."""
    shape = (1, 1, width) if axes is None else (axes, 1, 1, width)
    with torch.device("cpu"):
        channel = torch.arange(head_dim)
        # A column tells its number, from 2 on; what is not turned stays 1.
        columns = torch.arange(2.0, 2 + (axes or 1) * width, dtype=torch.float32).view(shape)
        every, zeros, ones = torch.ones(1, 1, 1, head_dim).float(), columns * 0, columns * 0 + 1
        # Turned by a quarter, a channel has the number of the other one, counted from 1, the first of a pair its negative.
        numbers = (channel.float() + 1).view(1, 1, 1, -1)
        try:
            column = rotate(rotation, sections, every, every, columns, zeros)[0].flatten().round().long() - 2
            quarter = rotate(rotation, sections, numbers, numbers, zeros, ones)[0].flatten().round().long()
            turned = column >= 0
            pairs = torch.stack(
                [torch.where(turned, quarter.abs() - 1, channel), torch.where(turned, column, -1)]
            )
            if bool(
                (pairs[0] < 0).any() or (pairs[0] >= head_dim).any() or (pairs[1] >= columns.numel()).any()
            ):
                return None
            return pairs.int() if _agrees(rotation, sections, pairs, shape) else None
        except Exception:  # whatever a model's function can't take: then it is run on what the model gives it
            return None


def _agrees(rotation: Any, sections: Sections, pairs: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the function turns these pairs, and does nothing else, on random numbers of several rows."""
    generator, rows = torch.Generator().manual_seed(0), (*shape[:-2], 3, shape[-1])

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32)

    other, column = pairs
    query, key, cos, sin = drawn(1, 2, 3, len(other)), drawn(1, 1, 3, len(other)), drawn(*rows), drawn(*rows)

    def by_channel(values: Tensor, unturned: float) -> Tensor:
        """[1, 1, 3, D] of [1, 3, F] or [A, 1, 3, F]."""
        values = values if values.dim() == 3 else values.movedim(0, 2).flatten(2)
        return torch.where(column >= 0, values[..., column.clamp(min=0)], unturned)[:, None]

    c, s = by_channel(cos, 1.0), by_channel(sin, 0.0)
    s = torch.where(other > torch.arange(len(other)), -s, s)
    found = rotate(rotation, sections, query, key, cos, sin)
    return all(
        torch.allclose(one, before * c + before[..., other] * s, rtol=TOLERANCE, atol=TOLERANCE)
        for one, before in zip(found, (query, key), strict=True)
    )
