"""What families of models have of their own: where an image's tokens stand, and how a batch of images is taken apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..vision_tower.patches import mean_of_patches, out_of_windows

Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout(ABC):
    """How a family lays out its images.

    Attributes:
        placeholders: The tokens that stand for images in a prompt.
        leading: Rows of the tower before each image that don't become tokens.
        axes: Axes of the decoder's position ids.
    """

    placeholders: tuple[int, ...]
    leading: int
    axes: int

    @abstractmethod
    def grids(self, fields: dict[str, Any], images: int) -> list[Grid]:
        """Return the rows and columns of tokens of each of the ``images`` in the multimodal ``fields``."""

    @abstractmethod
    def offsets(self, grid: Grid) -> Tensor:
        """Return the ids of an image's tokens, counted from its first one: [3, H * W] int64."""

    @abstractmethod
    def part(self, fields: dict[str, Any], first: int, after: int) -> dict[str, Any]:
        """Return the fields of the images from ``first`` to ``after - 1``."""

    def to_features(self, rows: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the rows of the tokens, [F, ...], of those of the tower's patches."""
        return rows


@dataclass(frozen=True)
class SquareLayout(Layout):
    """Images of one size, each patch of which is a token: LLaVA-1.5.

    Attributes:
        side: Rows, and columns, of tokens.
    """

    side: int

    def grids(self, fields: dict[str, Any], images: int) -> list[Grid]:
        """Return as many grids as there are images."""
        return [(self.side, self.side)] * images

    def offsets(self, grid: Grid) -> Tensor:
        """Count the tokens; vLLM asks for three axes, and all of them are the decoder's one."""
        return torch.arange(grid[0] * grid[1]).expand(3, -1)

    def part(self, fields: dict[str, Any], first: int, after: int) -> dict[str, Any]:
        """Slice every field, which has a row or an entry for each image."""
        return {name: value[first:after] for name, value in fields.items()}


@dataclass(frozen=True)
class PackedLayout(Layout):
    """Images of many sizes, packed into one sequence of patches, squares of which are tokens: Qwen-VL.

    Attributes:
        merge: Side of such a square.
        window: Side of a window in tokens, where the tower takes images window by window; else None.
    """

    merge: int
    window: int | None = None

    def grids(self, fields: dict[str, Any], images: int) -> list[Grid]:
        """Read ``image_grid_thw``, which vLLM keeps on the CPU; an image has one frame."""
        sizes = fields["image_grid_thw"].reshape(images, 3).tolist()
        return [(height // self.merge, width // self.merge) for _, height, width in sizes]

    def offsets(self, grid: Grid) -> Tensor:
        """Count rows and columns."""
        row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column]).flatten(1)

    def part(self, fields: dict[str, Any], first: int, after: int) -> dict[str, Any]:
        """Cut the patches where the images begin and end."""
        sizes = fields["image_grid_thw"]
        ends = [0, *sizes.prod(-1).cumsum(0).tolist()]
        patches = fields["pixel_values"][ends[first] : ends[after]]
        return {**fields, "pixel_values": patches, "image_grid_thw": sizes[first:after]}

    def to_features(self, rows: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Average the patches of each token, and put the tokens back into raster order."""
        rows = mean_of_patches(rows.unflatten(0, (-1, self.merge**2)), (1,))
        if self.window is None:
            return rows
        patches = [(1, height * self.merge, width * self.merge) for height, width in grids]
        return rows[out_of_windows(patches, self.merge, self.window).to(rows.device)]


def chunks(grids: Sequence[Grid], most: int) -> Iterator[tuple[int, int]]:
    """Yield the first image and the one after the last of runs of at most ``most`` tokens, or of one larger image."""
    first, tokens = 0, 0
    for number, (height, width) in enumerate(grids):
        if number > first and tokens + height * width > most:
            yield first, number
            first, tokens = number, 0
        tokens += height * width
    if first < len(grids):
        yield first, len(grids)
