"""Visual features that a model adds after its first decoder layers (Qwen3-VL and similar), for fewer rows.

The decoder's own loop adds them to full-length hidden states by a [B, Q] mask. Up to the pruning layer that is right. The
features for later layers are taken out of the loop, and added to the survivors before the next layer runs.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import first_later
from ..state import DecoderRun, Deepstack


def take_out(run: DecoderRun, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the decoder without the features of later layers, which go to ``run``.

    Raises:
        ValueError: Features belong after the last layer, after which nothing can be added.
    """
    name, features, rows = _features_of(kwargs)
    if not features:
        return kwargs
    last = len(run.attachment.text.layers) - 1
    if max(features) >= last:
        raise ValueError(
            f"{name} has features for decoder layer {max(features)}, the last one: pruning can't add them to fewer rows. "
            "Use keep=1.0"
        )
    first = first_later(run.config.layer)
    later = {layer: value for layer, value in features.items() if layer >= first}
    run.deepstack = Deepstack(rows, later)
    argument = kwargs[name]
    if isinstance(argument, dict):
        return {**kwargs, name: {k: v for k, v in argument.items() if k - 1 not in later}}
    return {**kwargs, name: argument[:first]}


def _features_of(kwargs: dict[str, Any]) -> tuple[str, dict[int, torch.Tensor], torch.Tensor]:
    """Name of the argument, features by the layer after which they are added, and the [B, Q] mask of their rows."""
    name = "deepstack_features"  # Granite 4 Vision: by the layer *before* which they are added, with a mask [B, Q, 1 or C]
    if kwargs.get(name):
        return name, {k - 1: v for k, v in kwargs[name].items()}, kwargs["vision_mask"][..., 0]
    name = "deepstack_visual_embeds"
    if kwargs.get(name):
        return name, dict(enumerate(kwargs[name])), kwargs["visual_pos_masks"]
    return name, {}, torch.empty(0)


def add_features(run: DecoderRun, hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
    """Return ``hidden_states`` [B, L, C], the output of ``layer``, plus the features of surviving visual rows there."""
    survivors = run.survivors
    if survivors is None or run.deepstack is None or layer not in run.deepstack.features:
        return hidden_states
    device = hidden_states.device
    rows = run.deepstack.rows.to(device)
    source = survivors.order.to(device).clamp(min=0)
    is_visual = rows.gather(1, source) & (survivors.order.to(device) >= 0)
    number = (rows.flatten().cumsum(0) - 1).view_as(rows)  # of each visual row among all of the batch
    features = run.deepstack.features[layer].to(device, hidden_states.dtype)
    full = torch.zeros_like(hidden_states)
    full[is_visual] = features[number.gather(1, source)[is_visual]]
    return hidden_states + full
