"""Masks of later layers in a decode step, taken from the model's own: for all stages at once, and shared by their layers."""

from __future__ import annotations

from typing import Any

import torch

from ..kv_cache.columns import Columns
from ..kv_cache.kept_tokens import growing_columns_of
from ..state import DecodeStep


def later_mask_known(step: DecodeStep, mask: Any) -> bool:
    """Return whether `later_mask` can take the masks of later layers from ``mask``, the model's own.

    Its columns must be all original positions up to those of this step, or of the whole buffer of a static cache.
    """
    columns = _columns_of(step)
    if columns is None:
        return False
    if mask is None:
        return columns.width is None
    width = step.tokens if columns.width is None else columns.width
    return (
        isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[2] == 1 and mask.shape[3] == width
    )


def later_mask(step: DecodeStep, stage: int, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the mask of the layers behind a stage.

    Args:
        step: The step.
        stage: The number of the stage.
        mask: The model's own mask [B or 1, H or 1, 1, K], bool (True = attend) or additive; None = nothing is hidden.

    Returns:
        [B, H or 1, 1, N], of the dtype of ``mask``, bool where that is None; None = nothing is hidden.
    """
    columns = _columns_of(step)
    assert columns is not None
    start = columns.starts[stage]
    if columns.stops is None:
        places = stop = step.places
    else:
        places, stop = columns.positions.shape[3], columns.stops[stage]
    if mask is None:
        if columns.real is None or step.kept.stages[stage].dense:
            return None
        return columns.real[:, :, stage : stage + 1, start:stop]
    masks = step.compute_once(mask, None, lambda: _take(mask, columns, places))
    return masks if len(columns.starts) == 1 else masks[:, :, stage : stage + 1, start:stop]


def later_cache_position(step: DecodeStep, stage: int, cache_position: torch.Tensor) -> torch.Tensor:
    """Return ``cache_position`` [1] counted from the own length of the layers behind a stage."""
    dropped = step.kept.stages[stage].dropped
    return step.compute_once(cache_position, stage, lambda: cache_position - dropped)


def _columns_of(step: DecodeStep) -> Columns | None:
    columns = step.kept.columns
    if step.tokens is None:
        return columns
    if columns is not None and columns.width is None and columns.positions.shape[3] >= step.places:
        return columns
    # A compiled step would be compiled anew whenever there is no more room.
    return None if torch.compiler.is_compiling() else growing_columns_of(step.kept, step.tokens)


def _take(mask: torch.Tensor, columns: Columns, places: int) -> torch.Tensor:
    """[B, H or 1, S, places], the columns of every stage of ``mask``."""
    positions = columns.positions[..., :places].to(mask.device)
    batch, _, stages, _ = positions.shape
    heads = mask.shape[1]
    taken = mask.expand(batch, heads, stages, -1).gather(3, positions.expand(batch, heads, stages, places))
    if columns.real is None:
        return taken
    real = columns.real[..., :places].to(mask.device)
    return taken & real if mask.dtype == torch.bool else taken.where(real, torch.finfo(mask.dtype).min)
