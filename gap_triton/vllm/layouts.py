"""What families of models have of their own: where an image's tokens stand, and how a batch of images is taken apart.

A video is an image of several frames, a grid each; what is said of images here holds for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..vision.layout import Layout, layout_of_frames, layout_of_packed
from ..vision.pictures import numbered
from ..vision_tower.patches import mean_of_patches, out_of_windows

CACHED_SIZES = 64
"""How many sizes of images keep their layout in memory, with what is made of it on a device."""


@lru_cache(CACHED_SIZES)
def layout_of_size(grid: tuple[int, int], frames: int = 1) -> Layout:
    """Return the layout of an image of so many rows and columns of tokens, or of a video of so many frames of them."""
    return layout_of_frames(frames, grid)


@dataclass(frozen=True)
class Family(ABC):
    """How a family lays out its images. Each has a `Layout` of its own, as the only image of the only sample.

    A batch of images, as vLLM makes it, is of images or of videos, never of both.

    Attributes:
        placeholders: The tokens that stand for images in a prompt.
        leading: Rows of the tower before each image, or each tile of one, that don't become tokens.
        axes: Axes of the decoder's position ids.
        frame_start: The token after which the tokens of each frame of a video come, where text stands between frames: then a
            frame is numbered as an image is; None = the frames of a video follow each other.
    """

    placeholders: tuple[int, ...]
    leading: int
    axes: int
    frame_start: int | None = field(default=None, kw_only=True)

    @abstractmethod
    def layouts(self, fields: dict[str, Any], images: int) -> list[Layout]:
        """Return where the tokens stand of each of the ``images`` in the multimodal ``fields``."""

    def intervals(self, fields: dict[str, Any], images: int) -> list[float]:
        """Return how many ids lie between two frames of each of the ``images``."""
        return [1.0] * images

    def offsets(self, layout: Layout, interval: float = 1.0) -> Tensor:
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


GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
"""Fields of images and of videos: frames, rows and columns of patches of each, and the patches."""


@dataclass(frozen=True)
class PackedFamily(Family):
    """Images and videos of many sizes, packed into one sequence of patches, squares of which are tokens: Qwen-VL.

    Attributes:
        merge: Side of such a square.
        window: Side of a window in tokens, where the tower takes images window by window; else None.
        per_second: Ids of the first axis that a second of a video takes.
    """

    merge: int
    window: int | None = None
    per_second: float = 1.0

    def layouts(self, fields: dict[str, Any], images: int) -> list[Layout]:
        """Read the numbers of patches, which vLLM keeps on the CPU."""
        sizes = fields[_grid_name(fields)].reshape(images, 3).tolist()
        return [
            layout_of_size((height // self.merge, width // self.merge), frames)
            for frames, height, width in sizes
        ]

    def intervals(self, fields: dict[str, Any], images: int) -> list[float]:
        """Read the seconds that a frame takes, which vLLM keeps on the CPU where a model asks for them."""
        seconds = fields.get("second_per_grid_ts")
        if seconds is None:
            return [1.0 if "image_grid_thw" in fields else self.per_second] * images
        return [each * self.per_second for each in torch.as_tensor(seconds).reshape(images).tolist()]

    def offsets(self, layout: Layout, interval: float = 1.0) -> Tensor:
        """Count frames, rows and columns; not frames between which there is text."""
        height, width = layout.views[0].grid
        frames = torch.arange(len(layout.views), dtype=torch.float64)
        # As vLLM rounds without pruning.
        times = (frames * (interval if self.frame_start is None else 0)).long()
        grid = torch.meshgrid(times, torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack(grid).flatten(1)

    def part(self, fields: dict[str, Any], first: int, after: int) -> dict[str, Any]:
        """Cut the patches where the images begin and end."""
        pixels = GRIDS[_grid_name(fields)]
        ends = [0, *fields[_grid_name(fields)].prod(-1).cumsum(0).tolist()]
        patches = fields[pixels][ends[first] : ends[after]]
        return {**super().part(fields, first, after), pixels: patches}

    def by_image(self, rows: Tensor, fields: dict[str, Any], layouts: Sequence[Layout]) -> list[Tensor]:
        """Average the patches of each token, and put the tokens back into raster order."""
        rows = mean_of_patches(rows.unflatten(0, (-1, self.merge**2)), (1,))
        if self.window is not None:
            grids = [(len(layout.views), *layout.views[0].grid) for layout in layouts]
            patches = [(frames, height * self.merge, width * self.merge) for frames, height, width in grids]
            rows = rows[out_of_windows(patches, self.merge, self.window).to(rows.device)]
        return super().by_image(rows, fields, layouts)


def _grid_name(fields: dict[str, Any]) -> str:
    return next(name for name in GRIDS if name in fields)


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
