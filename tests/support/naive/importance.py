"""Importance as a loop over samples, heads, rows and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def oracle(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    rows: Tensor | None = None,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    value: Tensor | None = None,
    head_reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Scores [B, V] and log-sum-exp [B, Hq, R] from the definition, in Python floats.

    Inputs are taken as they are (a bfloat16 input means its exact value): only the computation differs.
    """
    batch, query_heads, num_rows, head_dim = query.shape
    key_heads, num_keys = key.shape[1:3]
    offset = num_keys - num_rows
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    wanted = [[num_rows - 1]] * batch if rows is None else rows.tolist()
    by_head = torch.zeros(query_heads, *visual_index.shape, dtype=torch.float64)
    lse = torch.zeros(batch, query_heads, len(wanted[0]) if batch else 0, dtype=torch.float64)
    for b in range(batch):
        valid = [row for row in wanted[b] if row >= 0]
        for h in range(query_heads):
            for r, row in enumerate(wanted[b]):
                if row < 0:
                    continue
                logits = {}
                for column in range(row + offset + 1 if causal else num_keys):
                    if attention_mask is None or bool(attention_mask[b, column]):
                        k = key[b, h // (query_heads // key_heads), column].double()
                        logits[column] = scale * float(query[b, h, row].double() @ k)
                total = sum(math.exp(x) for x in logits.values())
                lse[b, h, r] = math.log(total) if total else -math.inf
                for slot, position in enumerate(visual_index[b].tolist()):
                    if position >= 0 and position + offset in logits:
                        share = math.exp(logits[position + offset]) / total
                        if value is not None:
                            vector = value[b, h // (query_heads // key_heads), position + offset]
                            share *= math.fsum(abs(x) for x in vector.tolist())
                        by_head[h, b, slot] += share / len(valid)
    return by_head.mean(0) if head_reduction == "mean" else by_head.amax(0), lse


def make(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Query [B, Hq, Q, D] and key [B, Hkv, S, D] for shape (B, Hq, Hkv, Q, S, D)."""
    batch, query_heads, key_heads, num_rows, num_keys, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, query_heads, num_rows, head_dim, generator=generator)
    key = torch.randn(batch, key_heads, num_keys, head_dim, generator=generator)
    return query.to(dtype), key.to(dtype)
