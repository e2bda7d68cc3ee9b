"""Attention as a loop over samples, heads, rows and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of a result and its rounding: half precision stores 1 unit in the last place (the interpreter truncates).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Q, D] and log-sum-exp [B, Hq, Q] from the definition, one row at a time."""
    batch, query_heads, num_query, head_dim = query.shape
    key_heads, num_keys = key.shape[1:3]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    output = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(query_heads):
            shared = h // (query_heads // key_heads)
            for row in range(num_query):
                seen = [
                    column
                    for column in range(row + num_keys - num_query + 1 if causal else num_keys)
                    if attention_mask is None or bool(attention_mask[b, column])
                ]
                logits = [scale * float(query[b, h, row].double() @ key[b, shared, c].double()) for c in seen]
                if not seen:
                    continue
                highest = max(logits)
                weights = [math.exp(x - highest) for x in logits]
                total = math.fsum(weights)
                lse[b, h, row] = highest + math.log(total)
                for c, weight in zip(seen, weights, strict=True):
                    output[b, h, row] += weight / total * value[b, shared, c].double()
    return output, lse
