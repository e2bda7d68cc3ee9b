"""Attention received, as a loop over samples, heads, rows and keys."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}


def oracle(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention received [B, S], and log-sum-exp [B, H, S] (NaN for padding), one sequence and row at a time."""
    batch, heads, num_tokens, head_dim = query.shape
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    bounds = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    received = torch.zeros(batch, num_tokens, dtype=torch.float64)
    lse = torch.full((batch, heads, num_tokens), math.nan, dtype=torch.float64)
    for b in range(batch):
        for begin, end in itertools.pairwise(bounds):
            real = [t for t in range(begin, end) if attention_mask is None or bool(attention_mask[b, t])]
            for h in range(heads):
                shared = key[b, h // (heads // key.shape[1])].double()
                for row in real:
                    seen = [t for t in real if not causal or t <= row]
                    weights = [math.exp(scale * float(query[b, h, row].double() @ shared[t])) for t in seen]
                    total = math.fsum(weights)
                    lse[b, h, row] = math.log(total)
                    for t, weight in zip(seen, weights, strict=True):
                        received[b, t] += weight / total / (heads * len(real))
    return received, lse
