"""The shapes that are measured, named after the models that have them, and random inputs of such a shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gap_kernels
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One prompt: its visual tokens come first, its text tokens follow. S = visual + text.

    Attributes:
        name: How tables and options call it.
        visual: Visual tokens, V. One in four is kept.
        text: Text tokens; all of them score where many rows do.
        query_heads: Hq.
        key_heads: Hkv.
        head_dim: D, also the width of cos and sin.
        channels: C of the hidden states; 0 for a vision tower, which nothing is gathered from.
        axes: Position ids per token: 1, or 3 for M-RoPE.
    """

    name: str
    visual: int
    text: int
    query_heads: int
    key_heads: int
    head_dim: int
    channels: int
    axes: int = 1

    @property
    def tokens(self) -> int:
        """S."""
        return self.visual + self.text

    @property
    def side(self) -> int:
        """Rows and columns of the square of patches that the last visual tokens fill, so without a tower's CLS token."""
        return math.isqrt(self.visual)

    @property
    def keep(self) -> int:
        """Visual tokens that stay: a quarter."""
        return self.visual // 4

    @property
    def length(self) -> int:
        """Rows that stay."""
        return self.keep + self.text

    def matrix_bytes(self, batch: int, dtype: torch.dtype) -> int:
        """Bytes of one layer's S x S attention weights."""
        return batch * self.query_heads * self.tokens**2 * dtype.itemsize


DECODERS = (
    Shape("llava-1.5", 576, 64, 32, 32, 128, 4096),
    Shape("llava-next", 2880, 64, 32, 32, 128, 4096),
    Shape("onevision", 7290, 64, 28, 4, 128, 3584),
    Shape("qwen2.5-vl-1k", 1024, 64, 28, 4, 128, 3584, axes=3),
    Shape("qwen2.5-vl-4k", 4096, 64, 28, 4, 128, 3584, axes=3),
    Shape("qwen2.5-vl-video", 16384, 64, 28, 4, 128, 3584, axes=3),
)
TOWERS = (
    Shape("clip-336", 577, 0, 16, 16, 64, 0),
    Shape("siglip-384", 729, 0, 16, 16, 72, 0),
    Shape("qwen2.5-vl-tower", 4096, 0, 16, 16, 80, 0),
    Shape("qwen2.5-vl-tower-4k", 16384, 0, 16, 16, 80, 0),
)
TINY_DECODER = Shape("tiny", 40, 8, 4, 2, 16, 48, axes=3)
TINY_TOWER = Shape("tiny-tower", 33, 0, 2, 2, 16, 0)
"""The tiny ones are for trying the harness out; a time measured on them says nothing."""

SHAPES = {shape.name: shape for shape in (*DECODERS, *TOWERS, TINY_DECODER, TINY_TOWER)}


@dataclass(frozen=True)
class Case:
    """A shape at a batch size."""

    shape: Shape
    batch: int

    def __str__(self) -> str:
        return f"{self.shape.name}-b{self.batch}"


def find(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in SHAPES:
        raise ValueError(f"{name!r}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


ANCHOR_EVERY = 5


@dataclass(frozen=True)
class Inputs:
    """Random arguments of every operator at one shape; a vision tower's hidden states have no channels."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden_states: Tensor
    cos: Tensor
    sin: Tensor
    position_ids: Tensor
    visual: Tensor
    """Which tokens are visual, [B, S]."""
    visual_index: Tensor
    text_rows: Tensor
    scores: Tensor
    lse: Tensor
    """Log-sum-exp of the last row, [B, Hq, 1]."""
    neighbours: Tensor
    """Of each patch in 2 x 2 regions, [1, P, 3]; the patches are the last P visual tokens that fill a square."""
    anchors: Tensor
    """One patch in five, [B, M]."""
    pillars: Tensor
    """Every other anchor."""
    keep: int
    length: int

    def tensors(self) -> list[Tensor]:
        """All of them, for copying one set of inputs into another."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def double(self) -> Inputs:
        """The same values in float64, which the reference computes exactly enough to judge the others by."""
        floats = ("query", "key", "value", "hidden_states", "cos", "sin", "lse")
        fields = {**vars(self), **{name: getattr(self, name).double() for name in floats}}
        return Inputs(**fields)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Draw random inputs on ``device``; another seed gives other values everywhere but in the indices."""
    shape, batch = case.shape, case.batch
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    def heads(count: int) -> Tensor:
        # Heads beside positions in memory, as projections leave them.
        return draw(batch, shape.tokens, count, shape.head_dim).transpose(1, 2)

    def rows(width: int) -> Tensor:
        return draw(batch, shape.tokens, width)

    patches = shape.side**2
    anchors = torch.arange(0, patches, ANCHOR_EVERY, device=device).repeat(batch, 1)
    query, key, value = heads(shape.query_heads), heads(shape.key_heads), heads(shape.key_heads)
    tokens = torch.arange(shape.tokens, device=device)
    axes = [tokens + 7 * axis for axis in range(shape.axes)]
    ids = (axes[0] if shape.axes == 1 else torch.stack(axes)[:, None]).expand(
        *([] if shape.axes == 1 else [shape.axes]), batch, shape.tokens
    )
    text = tokens[shape.visual :] if shape.text else tokens[-1:]
    scores = torch.rand(batch, shape.visual, generator=generator, device=device).square()
    return Inputs(
        query=query,
        key=key,
        value=value,
        hidden_states=rows(shape.channels),
        cos=rows(shape.head_dim),
        sin=rows(shape.head_dim),
        position_ids=ids.contiguous(),
        visual=(tokens < shape.visual).repeat(batch, 1),
        visual_index=tokens[: shape.visual].repeat(batch, 1),
        text_rows=text.repeat(batch, 1),
        scores=scores,
        lse=last_row_lse(query, key),
        neighbours=gap_kernels.grid_neighbours((shape.side, shape.side), device=device)[None].clone(),
        anchors=anchors,
        pillars=anchors % 2 == 0,
        keep=shape.keep,
        length=shape.length,
    )


def last_row_lse(query: Tensor, key: Tensor) -> Tensor:
    """Log-sum-exp [B, Hq, 1] of the last row's scaled scores, float32."""
    grouped = query[:, :, -1:].float().reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    logits = grouped @ key.float().transpose(-1, -2) * query.shape[3] ** -0.5  # [B, Hkv, G, S]
    return logits.logsumexp(-1).reshape(query.shape[0], query.shape[1], 1)
