"""Queries and keys as they are before rotary embedding, for ``score="unrotated"``."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .state import ForwardState

# Names under which modeling files keep the function that rotates queries and keys.
ROTATIONS = ("apply_multimodal_rotary_pos_emb", "apply_rotary_pos_emb")


def unrotated(
    state: ForwardState, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn ``query`` [B, Hq, S, D] and ``key`` [B, Hkv, S, D] of the scoring layer back, by the model's own rotation.

    A rotation by an angle is undone by one with the negative sine. Whatever the model does besides (only some channels,
    several axes, interleaved pairs), its own function does here too.

    Raises:
        ValueError: The model has no such function, or rotates by something else than one cos and sin for all heads.
    """
    assert state.scorer is not None
    module: Any = state.scorer
    functions = vars(inspect.getmodule(type(module)))
    rotate = next((functions[name] for name in ROTATIONS if name in functions), None)
    rotary = state.rotary
    if rotate is None or not isinstance(rotary, tuple) or len(rotary) != 2:
        raise ValueError(
            f"score='unrotated': {type(module).__name__} has no {' or '.join(ROTATIONS)} with one cos and sin, so its "
            "rotation can't be undone; use score='last_token'"
        )
    cos, sin = (x.to(query.device)[..., : query.shape[2], :] for x in rotary)
    sections: tuple[Any, ...] = ()
    if "mrope_section" in inspect.signature(rotate).parameters:
        parameters = getattr(module, "rope_scaling", None) or module.config.rope_parameters
        sections = (parameters["mrope_section"],)
    query, key = rotate(query, key, cos, -sin, *sections)
    # Some embeddings scale cos and sin (YaRN), forth and back alike; the channels that turn are scaled twice by now.
    stretch = (cos.float().square() + sin.float().square())[..., :1, :1].flatten()[0]
    return query / stretch, key / stretch
