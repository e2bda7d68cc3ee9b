"""What a model's rotary embedding does to vectors of ones, as ``gap_kernels.corrected_importance`` takes it."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..constants import Constants
from ..host import to_device
from .unrotated import cos_and_sin, rotate_by, rotation_of

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
    rotate, channels, head_dim = rotation_of(module), cos.shape[-1], query.shape[-1]
    turns = _turns(module, rotate, channels, head_dim) if cos.dim() == 3 else None
    if turns is None:
        return None
    device, batch = query.device, query.shape[0]
    on_device = _TURNS.get((rotate, channels, head_dim, device), device, lambda: to_device(turns, device))
    return Rope(cos.expand(batch, -1, -1), sin.expand(batch, -1, -1), on_device)


# By function, length of cos and sin, and head_dim. Nothing can be tried out while a graph is compiled.
_known: dict[tuple[Any, int, int], list[int] | None] = {}


def _turns(module: Any, rotate: Any, channels: int, head_dim: int) -> list[int] | None:
    """Return what ``rotate``, the function of the attention ``module``, makes of a 1 in each channel of a head.

    It is tried out on the CPU, once for each length of cos and sin.
    """
    key = (rotate, channels, head_dim)
    if key not in _known:
        if torch.compiler.is_compiling():
            return None
        # Real numbers also while operators are traced.
        with _disable_current_modes(), torch.no_grad():
            _known[key] = _tried_out(module, rotate, channels, head_dim)
    return _known[key]


def _tried_out(module: Any, rotate: Any, channels: int, head_dim: int) -> list[int] | None:
    if "mrope_section" in inspect.signature(rotate).parameters:
        return None  # it takes cos and sin of several axes
    # In each row one channel of cos, or one of sin, is 1; in the last one none is.
    each = torch.eye(2 * channels + 1, dtype=torch.float32, device="cpu")[None, :, :-1]
    ones = torch.ones(1, 1, each.shape[1], head_dim, dtype=torch.float32, device="cpu")
    query, key = rotate_by(module, ones, ones, each[..., :channels], each[..., channels:])
    of_cos, of_sin, rest = query[0, 0].split([channels, channels, 1])  # [E, D] twice, [1, D]
    of_cos, of_sin = of_cos - rest, of_sin - rest
    signs = of_sin.sum(0)  # [D], 0 where nothing is turned
    turns = (of_cos.argmax(0) + 1) * signs.long()
    expected = torch.arange(1, channels + 1, device="cpu")[:, None] == turns.abs()  # [E, D]
    as_told = (
        torch.equal(query, key)
        and torch.equal(rest[0], (turns == 0).float())
        and torch.equal(of_cos, expected.float())
        and torch.equal(of_sin, expected * signs)
    )
    return turns.tolist() if as_told else None
