"""Positions of visual rows in their images, for stages in the decoder that spread their choice over the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..attachment import Attachment
from ..state import Prompt
from ..strategies import spatial_order
from ..strategies.grid_positions import LAST, REGION, GridPositions
from ..vision.layout import View, layout_of


def grid_positions_of(attachment: Attachment, kwargs: dict[str, Any], prompt: Prompt) -> GridPositions:
    """Return the positions of the prompt's visual rows in their images.

    Args:
        attachment: The attachment of the forward.
        kwargs: Keyword arguments of its owner.
        prompt: The prompt.

    Raises:
        ValueError: The positions are not known.
    """
    layout = layout_of(attachment.owner, kwargs, prompt.visual, prompt.visual_index, prompt.visual_counts)
    return place_views(layout.views, prompt.visual)


def place_views(views: Sequence[View], visual: torch.Tensor) -> GridPositions:
    """Return the positions of the rows of ``visual`` [B, Q] that are in ``views``."""
    region = torch.full(visual.shape, -1, device=visual.device)
    cell = torch.zeros_like(region)
    order = torch.full_like(region, LAST)
    regions = [0] * visual.shape[0]
    for view in views:
        height, width = view.grid
        number = torch.arange(height * width, device=visual.device)
        down, right = number // width, number % width
        wide = -(-width // REGION)
        rows = view.rows.to(visual.device)
        region[view.sample, rows] = regions[view.sample] + down // REGION * wide + right // REGION
        cell[view.sample, rows] = down % REGION * REGION + right % REGION
        spread = spatial_order(view.grid).to(visual.device)
        order[view.sample, rows] = spread * LAST // (height * width)
        regions[view.sample] += -(-height // REGION) * wide
    return GridPositions(region, cell, order, max(regions))
