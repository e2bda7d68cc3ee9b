"""``visual_prompt``: what the host reads of a prompt before it goes to the device, so that a prefill reads nothing back."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..arguments import VISUAL_MASK, VISUAL_PROMPT
from ..introspect import visual_token_ids
from ..visual_prompt import VisualPrompt, count_rows
from .supported_models import find_parts, unwrap

Inputs = TypeVar("Inputs", bound=MutableMapping[str, Any])

SIZE_FIELDS = (
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
)  # how large images are, by their names in processors


def prepare(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return ``inputs`` with what a pruned prefill would otherwise have to read back from the device.

    Call it on what the processor returns, and move the result: ``gap_triton.prepare(model, processor(...)).to(device)``.
    The result has one entry more, ``visual_prompt``, for `forward` and `generate` of a model that is attached. It holds
    numbers of the host, which stay there. It belongs to these inputs: after a change of their tokens or padding, call this
    again. Another shape is refused; other values of the same shape can be seen on the CPU only, and are refused there.

    Args:
        model: The model that will get them; attached by then.
        inputs: ``input_ids`` or ``visual_mask`` [B, T], on the CPU, and all else that the model takes.

    Raises:
        ValueError: The inputs don't say where visual tokens are, or are on another device than the CPU.
    """
    owner = find_parts(unwrap(model)).owner
    visual = _visual_of(inputs, visual_token_ids(owner.config))
    mask = inputs.get("attention_mask")
    if mask is None:
        real = np.ones_like(visual)
    else:
        real = _on_host("attention_mask", mask) != 0
        if real.shape != visual.shape:
            raise ValueError(
                f"attention_mask has shape {list(real.shape)}: expected that of the tokens, {list(visual.shape)}"
            )
    sizes = {
        name: _on_host(name, inputs[name]).tolist() for name in SIZE_FIELDS if inputs.get(name) is not None
    }
    prepared = copy.copy(inputs)
    prepared[VISUAL_PROMPT] = VisualPrompt(visual & real, real, count_rows(visual, real), sizes)
    return prepared


def _visual_of(inputs: MutableMapping[str, Any], placeholders: list[int]) -> np.ndarray:
    """[B, T] bool, the visual tokens."""
    ids, mask = inputs.get("input_ids"), inputs.get(VISUAL_MASK)
    held = None
    if ids is not None and placeholders:
        held = np.isin(_on_host("input_ids", ids), placeholders)
    if mask is None and held is None:
        raise ValueError(
            "inputs hold neither input_ids with image placeholders nor visual_mask, so where visual tokens are is not "
            "known: pass visual_mask, a [B, T] bool tensor that is True at visual tokens"
        )
    visual = held if mask is None else _on_host(VISUAL_MASK, mask)
    assert visual is not None
    if visual.dtype != np.bool_ or visual.ndim != 2 or not visual.shape[1]:
        raise ValueError(
            f"visual tokens are given by {visual.dtype} {list(visual.shape)}: expected input_ids, or a bool visual_mask, "
            "of shape [B, T]"
        )
    if held is not None and mask is not None and (held.shape != visual.shape or (visual & ~held).any()):
        raise ValueError(
            "visual_mask names rows that hold no image placeholder in input_ids: expected a subset of the placeholders"
        )
    return visual


def _on_host(name: str, value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} is on {value.device}: gap_triton.prepare reads on the host, so call it before the inputs are moved"
            )
        return value.numpy()
    return np.asarray(value)


def named_prompt(given: Any) -> VisualPrompt | None:
    """Return ``given``, the argument ``visual_prompt`` of a forward.

    Raises:
        ValueError: It is not from `prepare`.
    """
    if given is not None and not isinstance(given, VisualPrompt):
        raise ValueError(
            f"visual_prompt is {type(given).__name__}: expected what gap_triton.prepare returns under that name"
        )
    return given
