"""Visual features that a model adds behind its first decoder layers (Qwen3-VL and kin), for fewer rows.

The decoder's own loop adds them to full-length hidden states by a [B, Q] mask. Up to the pruning layer that is right. What
belongs behind later layers is taken out of the loop and added, to the survivors, before the layer that comes next.
"""

from __future__ import annotations

from typing import Any

import torch

from .state import Deepstack, ForwardState


def take_out(state: ForwardState, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the decoder without the features of layers after the pruning layer, which go to ``state``."""
    features = kwargs.get("deepstack_visual_embeds")
    if features is None:
        return kwargs
    first = state.config.layer + 1
    layers = len(state.attachment.text.layers)
    if len(features) >= layers:
        raise ValueError(
            f"deepstack_visual_embeds has features for {len(features)} layers of a decoder of {layers}: expected at most "
            f"{layers - 1}, since what follows the last layer can't be pruned. Use keep=1.0"
        )
    later = {index: features[index] for index in range(first, len(features))}
    state.deepstack = Deepstack(kwargs["visual_pos_masks"], later)
    return {**kwargs, "deepstack_visual_embeds": features[:first]}


def add_behind(state: ForwardState, hidden_states: torch.Tensor, layer: int) -> torch.Tensor:
    """``hidden_states`` [B, L, C] that left ``layer``, with what the model adds there to those visual rows that survive."""
    if state.deepstack is None or layer not in state.deepstack.features:
        return hidden_states
    assert state.survivors is not None
    device = hidden_states.device
    rows = state.deepstack.rows.to(device)
    source = state.survivors.to(device).clamp(min=0)
    surviving = rows.gather(1, source) & (state.survivors.to(device) >= 0)
    place = (rows.flatten().cumsum(0) - 1).view_as(rows)  # of each visual row among all of the batch
    features = state.deepstack.features[layer].to(device)[place.gather(1, source)[surviving]]
    return state.attachment.text._deepstack_process(hidden_states, surviving, features)
