"""What families of models have of their own: where an image's tokens stand, and how a batch of images is taken apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..vision.layout import Layout, layout_of_grid, layout_of_packed
from ..vision.pictures import numbered
from ..vision_tower.patches import mean_of_patches, out_of_windows

CACHED_SIZES = 64
"""How many sizes of images keep their layout in memory, with what is made of it on a device."""


@lru_cache(CACHED_SIZES)
def layout_of_size(grid: tuple[int, int]) -> Layout:
    """Return the layout of an image of so many rows and columns of tokens."""
    return layout_of_grid(grid)


@dataclass(frozen=True)
class Family(ABC):
    """How a family lays out its images. Each has a `Layout` of its own, as the only image of the only sample.

    Attributes:
        placeholders: The tokens that stand for images in a prompt.
        leading: Rows of the tower before each image, or each tile of one, that don't become tokens.
        axes: Axes of the decoder's position ids.
    """

    placeholders: tuple[int, ...]
    leading: int
    axes: int

    @abstractmethod
    def layouts(self, fields: dict[str, Any], images: int) -> list[Layout]:
        """Return where the tokens stand of each of the ``images`` in the multimodal ``fields``."""

    def offsets(self, layout: Layout) -> Tensor:
        """Return the ids of an image's tokens, counted from its first one: [3, N] int64.

        vLLM asks for three axes; here all of them are the decoder's one.
        """
        return torch.arange(layout.counts[0]).expand(3, -1)

    def part(self, fields: dict[str, Any], first: int, after: int) -> dict[str, Any]:
        """Return the fields of the images from ``first`` to ``after - 1``: rows or entries of every field."""
        return {name: value[first:after] for name, value in fields.items()}

    def by_image(self, rows: Tensor, fields: dict[str, Any], layouts: Sequence[Layout]) -> list[Tensor]:
        """Return what of the tower's ``rows`` [F, ...] is each image's, by the features that its layout names."""
        return list(rows.split([layout.counts[0] for layout in layouts]))


@dataclass(frozen=True)
class SquareFamily(Family):
    """Images of one size, each patch of which is a token: LLaVA-1.5.

    Attributes:
        side: Rows, and columns, of tokens.
    """

    side: int

    def layouts(self, fields: dict[str, Any], images: int) -> list[Layout]:
        """Return one layout for all."""
        return [layout_of_size((self.side, self.side))] * images


@dataclass(frozen=True)
class TiledFamily(Family):
    """Images that are an overview, then tiles joined and cropped, with a newline after each row: LLaVA-NeXT and similar.

    Attributes:
        side: Rows, and columns, of tokens of a tile.
        pixels: Rows, and columns, of pixels of a tile.
        pinpoints: Rows and columns of pixels that images are cut to, several tiles together.
        pack: The model's own packing of an image's tiles: its size in pixels [2] int64, and features [tiles, side**2, C],
            the overview first, become its tokens [N, C].
    """

    side: int
    pixels: int
    pinpoints: tuple[tuple[int, int], ...]
    pack: Callable[[Tensor, Tensor], Tensor]

    def layouts(self, fields: dict[str, Any], images: int) -> list[Layout]:
        """Read ``image_sizes``, which vLLM keeps on the CPU."""
        return [layout_of_tiles(self, *size) for size in fields["image_sizes"].reshape(images, 2).tolist()]

    def by_image(self, rows: Tensor, fields: dict[str, Any], layouts: Sequence[Layout]) -> list[Tensor]:
        """Count the tiles, of which the last are padding where another image of the same prompt has more."""
        return list(rows.split([len(tiles) * self.side**2 for tiles in fields["pixel_values"]]))


@lru_cache(CACHED_SIZES)
def layout_of_tiles(family: TiledFamily, height: int, width: int) -> Layout:
    """Return the layout of an image of so many pixels, without views where the model interpolates between features."""
    tiles = image_size_to_num_patches([height, width], list(map(list, family.pinpoints)), family.pixels)
    packed = family.pack(torch.tensor([height, width]), numbered(tiles, family.side))
    return layout_of_packed(packed, family.side) or Layout((len(packed),), ())


@dataclass(frozen=True)
class PackedFamily(Family):
    """Images of many sizes, packed into one sequence of patches, squares of which are tokens: Qwen-VL.

    Attributes:
        merge: Side of such a square.
        window: Side of a window in tokens, where the tower takes images window by window; else None.
    """

    merge: int
    window: int | None = None

    def layouts(self, fields: dict[str, Any], images: int) -> list[Layout]:
        """Read ``image_grid_thw``, which vLLM keeps on the CPU; an image has one frame."""
        sizes = fields["image_grid_thw"].reshape(images, 3).tolist()
        return [layout_of_size((height // self.merge, width // self.merge)) for _, height, width in sizes]

    def offsets(self, layout: Layout) -> Tensor:
        """Count rows and columns."""
        height, width = layout.views[0].grid
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column]).flatten(1)

    def part(self, fields: dict[str, Any], first: int, after: int) -> dict[str, Any]:
        """Cut the patches where the images begin and end."""
        sizes = fields["image_grid_thw"]
        ends = [0, *sizes.prod(-1).cumsum(0).tolist()]
        patches = fields["pixel_values"][ends[first] : ends[after]]
        return {**fields, "pixel_values": patches, "image_grid_thw": sizes[first:after]}

    def by_image(self, rows: Tensor, fields: dict[str, Any], layouts: Sequence[Layout]) -> list[Tensor]:
        """Average the patches of each token, and put the tokens back into raster order."""
        rows = mean_of_patches(rows.unflatten(0, (-1, self.merge**2)), (1,))
        if self.window is not None:
            grids = [layout.views[0].grid for layout in layouts]
            patches = [(1, height * self.merge, width * self.merge) for height, width in grids]
            rows = rows[out_of_windows(patches, self.merge, self.window).to(rows.device)]
        return super().by_image(rows, fields, layouts)


def chunks(layouts: Sequence[Layout], most: int) -> Iterator[tuple[int, int]]:
    """Yield the first image and the one after the last of runs of at most ``most`` tokens, or of one larger image."""
    first, tokens = 0, 0
    for number, layout in enumerate(layouts):
        (count,) = layout.counts
        if number > first and tokens + count > most:
            yield first, number
            first, tokens = number, 0
        tokens += count
    if first < len(layouts):
        yield first, len(layouts)
