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
    if mask is not None:
        masks = step.compute_once(mask, None, lambda: _take(mask, columns, step))
    elif columns.real is not None and not step.kept.stages[stage].dense:
        masks = columns.real
    else:
        return None
    start, stop = columns.starts[stage], step.places if columns.stops is None else columns.stops[stage]
    if masks.shape[2] == 1 and start == 0 and stop == masks.shape[3]:
        return masks
    return step.compute_once(masks, stage, lambda: masks[:, :, stage : stage + 1, start:stop])


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


def _take(mask: torch.Tensor, columns: Columns, step: DecodeStep) -> torch.Tensor:
    """[B, H or 1, S, N], the columns of every stage of ``mask``."""
    positions, real = columns.positions, columns.real
    if columns.stops is None:
        positions, real = positions[..., : step.places], None if real is None else real[..., : step.places]
    if positions.device != mask.device:
        positions, real = positions.to(mask.device), None if real is None else real.to(mask.device)
    batch, _, stages, places = positions.shape
    heads = mask.shape[1]
    if mask.shape[0] != batch or stages > 1:
        mask = mask.expand(batch, heads, stages, -1)
    taken = mask.gather(3, positions if heads == 1 else positions.expand(batch, heads, stages, places))
    if real is None:
        return taken
    return taken & real if mask.dtype == torch.bool else taken.where(real, torch.finfo(mask.dtype).min)
