"""What rotary embedding alone makes of attention, in the form that ``gap_kernels.corrected_importance`` takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .unrotated import cos_and_sin, rotate_by, rotation_of

SCORE = "raters_corrected"
CLOSE = 1e-4
"""Of products of float32 vectors, relative."""


class Rope(NamedTuple):
    """How rows are turned.

    Attributes:
        cos: [B, S, E].
        sin: [B, S, E].
        turned: How many channels of a head are, E or 2 E.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    turned: int


def rope_of(module: Any, rotary: Any, query: torch.Tensor) -> Rope | None:
    """Return how the attention ``module`` turned the rows of ``query`` [B, H, S, D] by ``rotary``, cos and sin.

    Returns:
        None where that isn't known to be pairs of channels with an angle each: `unrotated.rotated_ones` knows no such form.

    Raises:
        ValueError: The model has no such function, or rotates by something else than one cos and sin for all heads.
    """
    cos, sin = cos_and_sin(module, rotary, query, SCORE)
    turned = turned_channels(module, cos.shape[-1], query.shape[-1]) if cos.dim() == 3 else None
    if turned is None:
        return None
    return Rope(cos.expand(query.shape[0], -1, -1), sin.expand(query.shape[0], -1, -1), turned)


# By function, length of cos and sin, and head_dim. Nothing can be tried out while a graph is compiled.
_known: dict[tuple[Any, int, int], int | None] = {}


def turned_channels(module: Any, angles: int, head_dim: int) -> int | None:
    """Return how many channels of a head the attention ``module`` turns, by ``angles`` channels of cos and sin.

    The product of two vectors of ones that its own function turns is compared with that of pairs of channels, each turned
    by one angle. This is tried out on the CPU, once.

    Returns:
        ``angles``, or twice as many where each is for both channels of a pair; None where the products differ.
    """
    key = (rotation_of(module), angles, head_dim)
    if key not in _known:
        if torch.compiler.is_compiling():
            return None
        # Real numbers also while operators are traced.
        with _disable_current_modes(), torch.no_grad():
            _known[key] = _tried_out(module, angles, head_dim)
    return _known[key]


def _tried_out(module: Any, angles: int, head_dim: int) -> int | None:
    rotate: Any = rotation_of(module)
    if "mrope_section" in inspect.signature(rotate).parameters:
        return None  # it takes cos and sin of several axes
    for angle in _angles(angles):
        ones = torch.ones(1, 1, len(angle), head_dim, dtype=torch.float32, device="cpu")
        zeros = torch.zeros_like(angle)[None]
        turned = int((rotate_by(module, ones, ones, zeros, zeros)[0][0, 0, 0] == 0).sum())
        cos, sin = angle.cos(), angle.sin()
        query, key = (x[0, 0] for x in rotate_by(module, ones, ones, cos[None], sin[None]))
        expected = (cos @ cos.T + sin @ sin.T) * turned / angles + head_dim - turned
        if turned in (angles, 2 * angles) and torch.allclose(query @ key.T, expected, rtol=CLOSE):
            return turned
    return None


def _angles(length: int) -> Iterator[torch.Tensor]:
    """Yield angles of some rows, [rows, length] float32: of each channel, and of pairs in halves and side by side."""
    rows = torch.arange(1, 5, dtype=torch.float32, device="cpu")[:, None]
    channels = torch.arange(1, length + 1, dtype=torch.float32, device="cpu")
    yield rows * channels * 0.1
    if length % 2 == 0:
        half = rows * channels[: length // 2] * 0.1
        yield torch.cat([half, half], dim=1)
        yield half.repeat_interleave(2, dim=1)
