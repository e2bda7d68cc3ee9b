"""Positions of visual rows in their images, for stages in the decoder that spread their choice over the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..attachment import Attachment
from ..host import to_device
from ..state import Prompt
from ..strategies.grid_positions import LAST, REGION, GridPositions
from ..strategies.spatial import spatial_order_on_host
from ..vision.layout import Layout, layout_of


def grid_positions_of(attachment: Attachment, kwargs: dict[str, Any], prompt: Prompt) -> GridPositions:
    """Return the positions of the prompt's visual rows in their images.

    Args:
        attachment: The attachment of the forward.
        kwargs: Keyword arguments of its owner.
        prompt: The prompt.

    Raises:
        ValueError: The positions are not known.
    """
    layout = layout_of(
        attachment.owner,
        kwargs,
        prompt.visual,
        prompt.visual_index,
        prompt.visual_counts,
        layouts=attachment.layouts,
    )
    device, (batch, queries) = prompt.visual.device, prompt.visual.shape
    positions, regions = layout.constants.get(
        ("positions", device), device, lambda: _positions_of_tokens(layout, device)
    )
    # One more row takes the filler.
    index = prompt.visual_index
    rows = torch.where(index < 0, queries, index) if min(layout.counts) < index.shape[1] else index
    nowhere = torch.tensor([-1, 0, LAST])[:, None, None]
    everywhere = layout.constants.get(
        ("nowhere", batch, queries, device),
        device,
        lambda: to_device(nowhere.expand(-1, batch, queries + 1).contiguous(), device),
    )
    by_row = everywhere.scatter(2, rows.expand(3, -1, -1), positions)[..., :-1]
    region, cell, order = by_row
    return GridPositions(region, cell, order, regions)


def _positions_of_tokens(layout: Layout, device: torch.device) -> tuple[torch.Tensor, int]:
    """[3, B, V] int64, region, cell and order of each visual token, as in `GridPositions`; and the number of regions."""
    shape = (len(layout.counts), max(layout.counts))
    region, cell, order = np.full(shape, -1), np.zeros(shape, dtype=np.int64), np.full(shape, LAST)
    regions = [0] * shape[0]
    for view in layout.views:
        height, width = view.grid
        number = np.arange(height * width)
        down, right = number // width, number % width
        wide = -(-width // REGION)
        tokens = view.sample, view.numbers
        region[tokens] = regions[view.sample] + down // REGION * wide + right // REGION
        cell[tokens] = down % REGION * REGION + right % REGION
        order[tokens] = spatial_order_on_host(view.grid) * LAST // (height * width)
        regions[view.sample] += -(-height // REGION) * wide
    return to_device(torch.from_numpy(np.stack([region, cell, order])), device), max(regions)
