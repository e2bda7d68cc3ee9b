"""Positions of visual tokens in their images, for stages in the decoder that spread their choice over the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..attachment import Attachment
from ..host import to_device
from ..state import Prompt
from ..strategies.coverage import REGION
from ..strategies.grid_positions import LAST, GridPositions
from ..strategies.spatial import spatial_order_on_host
from ..vision.layout import Layout, layout_of

CELLS = REGION * REGION


def grid_positions_of(attachment: Attachment, kwargs: dict[str, Any], prompt: Prompt) -> GridPositions:
    """Return the positions of the prompt's visual tokens in their images.

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
    device = prompt.visual.device
    neighbours, order = layout.constants.get(
        ("positions", device), device, lambda: _positions_of_tokens(layout, device)
    )
    return GridPositions(neighbours, order, prompt.visual_index, prompt.visual.shape[1])


def _positions_of_tokens(layout: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, V, 3] int32 and [B, V] int64, neighbours and order of each visual token, as in `GridPositions`."""
    shape = (len(layout.counts), max(layout.counts))
    neighbours, order = np.full((*shape, CELLS - 1), -1, dtype=np.int32), np.full(shape, LAST)
    for view in layout.views:
        height, width = view.grid
        others = _neighbours_on_host(height, width)
        tokens = view.sample, view.numbers
        neighbours[tokens] = np.where(others < 0, -1, view.numbers[others])
        order[tokens] = spatial_order_on_host(view.grid) * LAST // (height * width)
    return to_device(torch.from_numpy(neighbours), device), to_device(torch.from_numpy(order), device)


def _neighbours_on_host(height: int, width: int) -> np.ndarray:
    """[H * W, 3] int64, the other cells of each cell's region, -1 = none: `gap_kernels.grid_neighbours` without PyTorch."""
    number = np.arange(height * width)[:, None]
    down, right = number // width, number % width
    cell = (down % REGION * REGION + right % REGION + np.arange(1, CELLS)) % CELLS
    down, right = down - down % REGION + cell // REGION, right - right % REGION + cell % REGION
    return np.where((down < height) & (right < width), down * width + right, -1)
