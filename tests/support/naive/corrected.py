"""Attention over what RoPE makes of it, as a loop over samples, heads, rows and tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scores are quotients of what importance rounds, and of sums of as many products as there are channels.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
CLEAR = 1e-4
"""Heads whose sums are nearer to each other than this may be ranked either way."""


def turned_ones(cos: list[float], sin: list[float], turns: list[int]) -> list[float]:
    """A vector of ones after RoPE."""
    return [
        cos[abs(turn) - 1] + math.copysign(1.0, turn) * sin[abs(turn) - 1] if turn else 1.0 for turn in turns
    ]


def oracle(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    cos: Tensor,
    sin: Tensor,
    turns: Tensor,
    heads: int,
    rows: Tensor | None = None,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, float]:
    """Scores [B, V] in Python floats, and by how much the last head that counts has more than the next."""
    batch, query_heads, num_rows, head_dim = query.shape
    key_heads, num_keys = key.shape[1:3]
    offset = num_keys - num_rows
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    wanted = [[num_rows - 1]] * batch if rows is None else rows.tolist()
    scores = torch.zeros(visual_index.shape, dtype=torch.float64)
    clear = math.inf
    for b in range(batch):
        ones = [
            turned_ones(*angles, turns.tolist())
            for angles in zip(cos[b].tolist(), sin[b].tolist(), strict=True)
        ]
        valid = [row for row in wanted[b] if row >= 0]
        by_head = [[0.0] * visual_index.shape[1] for _ in range(query_heads)]
        for h in range(query_heads):
            for row in valid:
                logits = {}
                for column in range(row + offset + 1):
                    if attention_mask is None or bool(attention_mask[b, column]):
                        k = key[b, h // (query_heads // key_heads), column].double()
                        logits[column] = scale * float(query[b, h, row].double() @ k)
                most = max(logits.values(), default=0.0)
                total = sum(math.exp(x - most) for x in logits.values())
                for slot, position in enumerate(visual_index[b].tolist()):
                    if position >= 0 and position + offset in logits:
                        products = zip(ones[row], ones[position], strict=True)
                        by_rope = math.fsum(x * y for x, y in products) / math.sqrt(head_dim)
                        by_head[h][slot] += math.exp(logits[position + offset] - most) / total / by_rope
        order = sorted(range(query_heads), key=lambda h: (-math.fsum(by_head[h]), h))
        sums = [math.fsum(by_head[h]) for h in order]
        if heads < query_heads:
            clear = min(clear, sums[heads - 1] - sums[heads])
        for slot in range(visual_index.shape[1]):
            mean = math.fsum(by_head[h][slot] for h in order[:heads]) / heads
            scores[b, slot] = mean / max(len(valid), 1)
    return scores, clear


def make_angles(
    batch: int, rows: int, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cos and sin [B, Q, E] of angles so near that nothing is orthogonal."""
    generator = torch.Generator().manual_seed(channels)
    angle = 0.7 * torch.rand(batch, rows, channels, generator=generator)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def halves(channels: int, head_dim: int) -> Tensor:
    """[D] int64, as Llama turns the first channels of a head: those of a pair are half of them apart."""
    places = torch.arange(1, channels + 1)
    turns = torch.zeros(head_dim, dtype=torch.int64)
    turns[:channels] = torch.where(places <= channels // 2, -places, places)
    return turns
