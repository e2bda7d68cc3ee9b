"""Tensor parallelism: every rank holds some of the heads, and all must keep the same tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..attachment import Attachment


def tensor_parallel_group(attachment: Attachment, query: torch.Tensor) -> Any | None:
    """Return the process group over which ``query`` [B, Hq, Q, D] is split by heads, None where it holds all of them.

    Raises:
        ValueError: Heads are missing and the model does not name the processes that hold them.
    """
    heads = attachment.text.config.num_attention_heads
    if query.shape[1] == heads:
        return None
    for module in attachment.modules():
        mesh = getattr(module, "_device_mesh", None)
        if mesh is None:
            continue
        names = mesh.mesh_dim_names
        return mesh.get_group("tp" if names is not None and "tp" in names else None)
    raise ValueError(
        f"the scoring layer holds {query.shape[1]} of {heads} attention heads, and the model has no device mesh to ask "
        "for the others: shard it with from_pretrained(..., tp_plan='auto'), and attach the whole model"
    )


def mean_over_ranks(scores: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the mean over all heads from the mean over each rank's heads, which are as many on every rank.

    Every rank receives the same bits, so all of them select the same tokens.
    """
    scores = scores.contiguous()
    dist.all_reduce(scores, group=group)
    return scores / dist.get_world_size(group)
