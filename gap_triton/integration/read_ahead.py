"""What a prefill reads from the device, in one read: what the prompt holds, and how large its images are.

Sizes are asked for while images are encoded, and the numbers of the prompt's rows when the decoder starts: each by itself
would be a read.
"""

from __future__ import annotations

from typing import Any

import gap_kernels
import torch
from torch import Tensor

from ..config import needs_grid
from ..prefill.answers import names_rows
from ..state import ForwardState, Prompt
from ..vision_tower import encoder_outputs
from ..vision_tower.sizes import GRID_FIELDS, HOST_SIZES, SHAPES
from ..visual_prompt import PromptCounts

TABLES = (*GRID_FIELDS.values(), "image_sizes", SHAPES)  # sizes with one row for each image


def read_ahead(state: ForwardState) -> None:
    """Read the prompt of a forward with the sizes of its images, where both are on the device and will be asked for."""
    owner = state.owner
    # `generate` of transformers 5 hands on what it has encoded, with the sizes, in place of pixels and sizes.
    encoded = [each.arguments for each in encoder_outputs(owner.kwargs).values()]
    given = {name: _first_given(name, owner.kwargs, *encoded) for name in TABLES}
    sizes = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.dim() == 2}
    if not sizes or not _asks_for_both(state, list(sizes.values())):
        return
    assert owner.visual is not None
    rows = gap_kernels.read_prompt(
        owner.visual.tokens, owner.visual.placeholders, attention_mask=owner.attention_mask
    )
    values = torch.cat([each.flatten() for each in (rows.counts, *sizes.values())]).tolist()
    first = rows.counts.numel()
    owner.prompt = Prompt(rows, None, PromptCounts(*map(tuple, _shaped(values[:first], rows.counts))))
    found: dict[str, Any] = {}
    for name, value in sizes.items():
        found[name] = _shaped(values[first : first + value.numel()], value)
        first += value.numel()
    owner.kwargs[HOST_SIZES] = found


def _first_given(name: str, *arguments: dict[str, Any]) -> Any:
    return next((each[name] for each in arguments if each.get(name) is not None), None)


def _asks_for_both(state: ForwardState, sizes: list[Tensor]) -> bool:
    """Return whether the prompt is a whole one without an answer, in tensors of one device, and a stage asks for sizes."""
    owner, visual = state.owner, state.owner.visual
    if visual is None or owner.prepared is not None or torch.compiler.is_compiling():
        return False
    tokens, mask = visual.tokens, owner.attention_mask
    if tokens.shape[1] < 2 or state.head.drafts or names_rows(state.head, visual):
        return False
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == tokens.shape):
        return False
    given = [tokens, *sizes, *([] if mask is None else [mask])]
    alike = all(type(each) is Tensor and each.device == tokens.device for each in given)
    return alike and any(map(needs_grid, state.config.stages))


def _shaped(values: list[int], like: Tensor) -> list[list[int]]:
    """The rows of a tensor of two dimensions, whose ``values`` follow each other."""
    width = like.shape[1]
    return [values[start : start + width] for start in range(0, len(values), width)]
