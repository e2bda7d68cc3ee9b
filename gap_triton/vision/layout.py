"""The position of each visual token in its image, and the row of the vision tower's output that it comes from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel

from ..arguments import VISUAL_GRID
from ..constants import Constants
from ..introspect import text_model_of
from ..vision_tower import Encoded, encoder_outputs
from ..vision_tower.finding import (
    PIXEL_FIELDS,
    image_shape,
    packs,
    patch_size_of,
    pooling_of,
    resamples,
    side_of,
)
from ..vision_tower.sizes import GRID_FIELDS, POSITIONS, SHAPES, SIZE_FIELDS, host_sizes
from .pictures import INTERPOLATED, Grid, Picture, numbered, numbered_newline, picture_of

MERGE_FIELDS = ("spatial_merge_size", "merge_kernel_size")
OPTIONS = ("vision_feature_select_strategy", "vision_aspect_ratio")  # of `pack_image_features`
TENSORS = 16
"""How many index tensors, or groups of them, stay in memory for each layout."""
ALTERNATIVE = (
    "choose a score and a coverage that don't ask where visual tokens stand, as presets 'text' and 'fastv' do"
)


@dataclass(frozen=True)
class View:
    """One regular grid of visual tokens: an image, the overview or the details of one, a frame of a video.

    Attributes:
        sample: Row of the batch.
        image: Number of the image or video in the batch, in order of appearance; its views share it.
        numbers: [N] int64, its tokens by their number among the visual ones of the sample, in raster order.
        grid: (H, W), H * W == N.
        features: [N] int64, the rows of `TowerOutput` that they come from.
    """

    sample: int
    image: int
    numbers: np.ndarray
    grid: tuple[int, int]
    features: np.ndarray

    @property
    def size(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class Layout:
    """The positions of a prompt's visual tokens in their images. It depends on their numbers and on sizes alone.

    It is on the host, in arrays of numpy, which are real also while operators are traced.

    Attributes:
        counts: Number of visual tokens of each sample.
        views: All grids, in order of appearance.
        constants: What is made of it: index tensors on a device.
    """

    counts: tuple[int, ...]
    views: tuple[View, ...]
    constants: Constants = field(default_factory=lambda: Constants(TENSORS))

    def unplaced(self) -> np.ndarray:
        """Return [B, V] bool, the tokens that are in no grid, such as the newlines of LLaVA-NeXT."""
        unplaced: np.ndarray = np.arange(max(self.counts, default=0)) < np.array(self.counts)[:, None]
        for view in self.views:
            unplaced[view.sample, view.numbers] = False
        return unplaced


def layout_of(
    owner: PreTrainedModel,
    kwargs: dict[str, Any],
    visual: Tensor,
    visual_index: Tensor,
    counts: Sequence[int],
    *,
    recorded: Mapping[str, Encoded] | None = None,
    layouts: Constants | None = None,
) -> Layout:
    """Find the grid of every image in a prompt.

    Reads nothing from the device but sizes of images, with one read, and these only where the host does not know them
    (`host_sizes`). The rows of visual tokens are read for the first prompt of its kind, and where they decide: for images
    beside videos, and for copies of samples.

    Args:
        owner: The module that receives ``input_ids``.
        kwargs: Its keyword arguments, ``input_ids`` among them where it was given.
        visual: [B, Q] bool, the visual tokens.
        visual_index: [B, V] int64, their rows, ascending, then -1.
        counts: Number of visual tokens of each sample.
        recorded: What was recorded of the encoders in this forward, by modality.
        layouts: Where layouts are kept, of this owner alone; None = nowhere.

    Raises:
        ValueError: The grids aren't known; the sentence says what is missing, and what can be done instead.
    """
    arguments, ahead = dict(kwargs), encoder_outputs(kwargs)
    for encoded in {**ahead, **(recorded or {})}.values():
        arguments |= {name: value for name, value in encoded.arguments.items() if value is not None}
    arguments = host_sizes(arguments)
    rows = _Rows(visual_index, tuple(counts))
    copies = _copies(ahead, arguments, rows)
    videos = _videos(owner, arguments, rows, visual.shape[1])

    def make() -> Layout:
        pictures = _pictures(owner, arguments, rows, copies)
        kinds = _kinds(pictures, rows.counts, videos)
        return Layout(rows.counts, tuple(_place(pictures, kinds, copies)))

    if layouts is None:
        return make()
    return layouts.get((rows.counts, copies, videos, _key(arguments)), None, make)


def _key(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What of ``arguments`` decides about a layout, to be looked up."""
    found = []
    for name in (*SIZE_FIELDS, *PIXEL_FIELDS, *OPTIONS, VISUAL_GRID):
        value = arguments.get(name)
        if name in PIXEL_FIELDS and value is not None:
            value = getattr(value, "shape", value)
            value = value if isinstance(value, torch.Size) else "given"
        found.append(tuple(value) if isinstance(value, list) else value)
    return tuple(found)


@dataclass(eq=False)
class _Rows:
    """The rows of the visual tokens of each sample.

    Attributes:
        index: [B, V] int64, ascending, then -1.
        counts: How many, by sample.
    """

    index: Tensor
    counts: tuple[int, ...]

    @functools.cached_property
    def on_host(self) -> list[Tensor]:
        """Those of each sample, [count] int64. One read."""
        return [rows[:count] for rows, count in zip(self.index.cpu(), self.counts, strict=True)]


# --------------------------------------------------------------------------------------------- placing
def _place(
    pictures: dict[str, list[Picture]], kinds: list[dict[str, np.ndarray]], copies: int
) -> Iterator[View]:
    """Assign the tokens of the samples to the pictures, both in order; each ``copies`` samples share their pictures."""
    pieces: list[tuple[int, int, Picture, np.ndarray]] = []  # sample, first token, picture, tokens
    for kind, queue in pictures.items():
        cursor = 0
        for first in range(0, len(kinds), copies):
            number = cursor
            for sample in range(first, first + copies):
                number, tokens, start = cursor, kinds[sample][kind], 0
                while start < len(tokens):
                    if number == len(queue) or start + queue[number].tokens > len(tokens):
                        raise ValueError(
                            f"sample {sample} has {len(tokens)} visual tokens of its {kind}s, which the sizes of the "
                            f"{len(queue)} {kind}s given with the prompt don't add up to: pass them in the order of the "
                            f"prompt, or {ALTERNATIVE}"
                        )
                    piece = tokens[start : start + queue[number].tokens]
                    pieces.append((sample, int(piece[0]), queue[number], piece))
                    start, number = start + len(piece), number + 1
            cursor = number
        if cursor < len(queue):
            raise ValueError(
                f"{len(queue)} {kind}s were given with the prompt, whose visual tokens belong to {cursor}: pass those of "
                f"the prompt only, or {ALTERNATIVE}"
            )
    pieces.sort(key=lambda piece: piece[:2])
    for image, (sample, _, picture, tokens) in enumerate(pieces):
        for grid in picture.grids:
            yield View(sample, image, tokens[grid.index], grid.size, grid.features)


def _copies(ahead: dict[str, Encoded], arguments: dict[str, Any], rows: _Rows) -> int:
    """How many copies of each sample follow each other: ``generate()`` repeats prompts, but not their images."""
    visual_grid = arguments.get(VISUAL_GRID)
    if ahead:
        recorded = sum(each.tokens for each in ahead.values())
    elif isinstance(visual_grid, list):
        recorded = sum(height * width for height, width in visual_grid)
    else:
        return 1
    visual, samples = sum(rows.counts), len(rows.counts)
    if recorded in (0, visual):
        return 1
    copies = visual // recorded
    right = copies > 0 and copies * recorded == visual and samples % copies == 0
    right = right and all(
        torch.equal(each, rows.on_host[i - i % copies]) for i, each in enumerate(rows.on_host)
    )
    if ahead and not right:
        raise ValueError(
            f"the prompt has {visual} visual tokens, and {recorded} were encoded ahead of it: pass the whole prompt at "
            f"once, without prefill_chunk_size, or {ALTERNATIVE}"
        )
    return copies if right and (ahead or _repeat(arguments, copies)) else 1


def _repeat(arguments: dict[str, Any], copies: int) -> bool:
    """Whether each ``copies`` samples in a row have the same input. One read."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    groups = (ids if ids is not None else embeds).unflatten(0, (-1, copies))  # type: ignore[union-attr]
    same = (groups == groups[:, :1]) | (groups != groups)  # NaN equals NaN
    return bool(same.all())


def _videos(
    owner: PreTrainedModel, arguments: dict[str, Any], rows: _Rows, queries: int
) -> tuple[bytes, ...] | None:
    """Which visual tokens of each sample are of videos, a byte each; None where all are of one kind. One read."""
    if any(arguments.get(name) is None for name in GRID_FIELDS.values()):
        return None
    types, ids = arguments.get("mm_token_type_ids"), arguments.get("input_ids")
    video = getattr(owner.config, "video_token_id", None)
    if types is not None:
        shows_video = types == 2
    elif ids is not None and video is not None:
        shows_video = ids == video
    else:
        raise ValueError(
            "images and videos in one prompt are told apart by mm_token_type_ids, or by the ids of their placeholders: pass "
            f"mm_token_type_ids or input_ids, or {ALTERNATIVE}"
        )
    index = rows.index.to(shows_video.device).clamp(min=0)
    of_tokens = shows_video[:, -queries:].gather(1, index).cpu().numpy()
    return tuple(of_tokens[i, :count].tobytes() for i, count in enumerate(rows.counts))


def _kinds(
    pictures: dict[str, list[Picture]], counts: Sequence[int], videos: tuple[bytes, ...] | None
) -> list[dict[str, np.ndarray]]:
    """The visual tokens of each sample, by their number, of images and of videos."""
    if videos is None:
        (only,) = pictures
        return [{only: np.arange(count)} for count in counts]
    shows_video = [np.frombuffer(each, dtype=bool) for each in videos]
    return [{"image": np.flatnonzero(~each), "video": np.flatnonzero(each)} for each in shows_video]


# --------------------------------------------------------------------------------------------- sizes
def _pictures(
    owner: PreTrainedModel, arguments: dict[str, Any], rows: _Rows, copies: int
) -> dict[str, list[Picture]]:
    """All images and videos of a prompt, in the order of their features."""
    pictures = _by_the_model(owner, arguments)
    visual_grid = arguments.get(VISUAL_GRID)
    if pictures is not None:
        if visual_grid is not None:
            raise ValueError(
                f"visual_grid={visual_grid!r}: {type(owner).__name__} tells the grids of its images itself; leave it out"
            )
        return pictures
    if visual_grid is None:
        visual_grid = _by_patches(owner, arguments, rows, copies)
    visual, shape = sum(rows.counts[::copies]), image_shape(arguments)
    grids = (
        visual_grid
        if isinstance(visual_grid, list)
        else [visual_grid] * -(-visual // (visual_grid[0] * visual_grid[1]))
    )
    images = None if shape is None else shape[0]
    if images is not None and len(grids) != images:
        raise ValueError(
            f"visual_grid={visual_grid!r} makes {len(grids)} images of {visual} visual tokens, and pixel_values hold "
            f"{images}: expected the rows and columns of visual tokens of each of them"
        )
    return _by_grids({"image": [(1, height, width) for height, width in grids]}, 1)


def _by_the_model(owner: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, list[Picture]] | None:
    """The images and videos of a prompt where the model gets, or sets, the size of each; else None."""
    grids = {kind: arguments[name] for kind, name in GRID_FIELDS.items() if arguments.get(name) is not None}
    if grids:
        return _by_grids(grids, _merge_size(owner))
    if GRID_FIELDS["image"] in _parameters(owner) and arguments.get(VISUAL_GRID) is None:
        raise ValueError(
            f"{type(owner).__name__} was not given {' or '.join(GRID_FIELDS.values())}, so where its visual tokens stand is "
            f"not known: pass it with the prompt, as the processor makes it, or {ALTERNATIVE}"
        )
    if arguments.get("pixel_values_videos") is not None:
        raise ValueError(
            f"pixel_values_videos: nothing tells how {type(owner).__name__} makes visual tokens of the frames of a video: "
            f"{ALTERNATIVE}"
        )
    if resamples(owner):
        return None
    if packs(owner):
        return {"image": _packed(owner, arguments)}
    for name in (SHAPES, POSITIONS):
        if arguments.get(name) is not None and name in _parameters(owner):
            return _by_grids({"image": [(1, *size) for size in arguments[name]]}, pooling_of(owner))
    patch = patch_size_of(getattr(owner.config, "vision_config", None))
    if arguments.get("image_sizes") is not None and "image_sizes" in _parameters(owner) and patch is not None:
        sizes = [(1, height // patch[0], width // patch[1]) for height, width in arguments["image_sizes"]]
        return _by_grids({"image": sizes}, pooling_of(owner))
    return None


def _by_patches(
    owner: PreTrainedModel, arguments: dict[str, Any], rows: _Rows, copies: int
) -> tuple[int, int]:
    """Rows and columns of visual tokens of each image where all are of one size: LLaVA and most others.

    They are those of the tower's patches, or of squares of them as the config says. That is checked by their number,
    which does not suffice alone: 256 tokens may be 16 x 16 or, as in MiniGPT-v2, 32 x 8. One read.
    """
    name = type(owner).__name__
    alternative = f"pass visual_grid=[H, W], or a list of one [H, W] per image, or {ALTERNATIVE}"
    size = None if resamples(owner) else _patches_of(owner, arguments)
    if size is None:
        raise ValueError(
            f"nothing tells how many rows and columns the visual tokens of {name} make: {alternative}"
        )
    pool, shape = pooling_of(owner), image_shape(arguments)
    grid = (size[0] // pool, size[1] // pool)
    tokens, visual = grid[0] * grid[1], sum(rows.counts[::copies])
    right = tokens * pool**2 == size[0] * size[1] > 0
    images = None if shape is None else shape[0]
    right = right and (images is None or images * tokens == visual)
    # Of a prompt that is traced the numbers must do.
    runs = rows.counts if _is_traced(rows.index) or not right else _runs(rows.on_host[::copies])
    if not right or any(run % tokens for run in runs):
        each = "an image" if images is None else f"each of {images} images"
        raise ValueError(
            f"{name} has {visual} visual tokens, and {each} of {size[0]} x {size[1]} patches makes {grid[0]} x {grid[1]} "
            f"by its config, so how many rows and columns they make is not known: {alternative}"
        )
    return grid


def _is_traced(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def _patches_of(owner: PreTrainedModel, arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches of each image, None where they aren't known."""
    vision = getattr(owner.config, "vision_config", None)
    patch = patch_size_of(vision)
    if patch is None:
        return None
    if (pixels := image_shape(arguments)) is not None:
        return pixels[1] // patch[0], pixels[2] // patch[1]
    if any(arguments.get(field) is not None for field in PIXEL_FIELDS):
        return None
    # Image features came from elsewhere: of a tower that has learned so many positions, they are of that size.
    size = getattr(vision, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2:
        return None
    grid = (sides[0] // patch[0], sides[1] // patch[1])
    text = text_model_of(owner)
    towers = (child for child in owner.children() if child is not text)
    return grid if any(_has_learned(tower, grid[0] * grid[1]) for tower in towers) else None


def _has_learned(tower: nn.Module, cells: int) -> bool:
    """Whether ``tower`` adds positions to ``cells`` patches, a CLS token or none, and has one strided convolution."""
    shapes = [parameter.shape for name, parameter in tower.named_parameters() if "position" in name]
    strided = [m for m in tower.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1]
    return len(strided) == 1 and any(cells in shape or cells + 1 in shape for shape in shapes)


def _by_grids(grids: Mapping[str, Sequence[tuple[int, int, int]]], merge: int) -> dict[str, list[Picture]]:
    """Pictures of given sizes (frames, rows and columns of patches); squares become a token, and each frame a grid."""
    pictures: dict[str, list[Picture]] = {}
    feature = 0
    for kind, sizes in grids.items():
        pictures[kind] = []
        for frames, height, width in sizes:
            size = (height // merge, width // merge)
            cells = np.arange(size[0] * size[1])
            starts = [frame * len(cells) for frame in range(frames)]
            views = tuple(Grid(size, cells + start, cells + start + feature) for start in starts)
            pictures[kind].append(Picture(frames * len(cells), views))
            feature += frames * len(cells)
    return pictures


def _merge_size(owner: PreTrainedModel) -> int:
    config = owner.config
    configs = (getattr(config, "vision_config", None), config)
    sides = (side_of(getattr(each, name, None)) for name in MERGE_FIELDS for each in configs)
    merge = next(filter(None, sides), None)
    if merge is None:
        raise ValueError(
            f"the config of {type(owner).__name__} has no {' or '.join(MERGE_FIELDS)}, so how many patches make one visual "
            f"token is not known: {ALTERNATIVE}"
        )
    return merge


def _packed(owner: PreTrainedModel, arguments: dict[str, Any]) -> list[Picture]:
    """Overview, then tiles joined and cropped, with a newline after each row: LLaVA-NeXT and similar.

    The model's own method runs on the numbers of the feature rows instead of the features.
    """
    sizes = arguments.get("image_sizes")
    if sizes is None:
        raise ValueError(
            f"{type(owner).__name__} was not given image_sizes, so how it has cut its images into tiles is not known: pass "
            f"image_sizes with the prompt, as the processor makes it, or {ALTERNATIVE}"
        )
    sizes = torch.tensor(sizes)
    side = _tower_side(owner)
    tiles = _tiles(owner, arguments, sizes)
    packed, _ = owner.pack_image_features(
        numbered(sum(tiles), side).split(tiles),
        sizes,
        image_newline=numbered_newline(),
        **_options(owner, arguments),
    )
    pictures = [picture_of(image, side) for image in packed]
    known = [picture for picture in pictures if picture is not None]
    if len(known) < len(pictures):
        raise ValueError(f"{INTERPOLATED}: pass a smaller image, or {ALTERNATIVE}")
    return known


def layout_of_packed(packed: Tensor, side: int) -> Layout | None:
    """Return the layout of one image in one sample, from what a model packs of `numbered` tiles: [N, 2] float64.

    None where the model has interpolated between features, so that its tokens are none of them.
    """
    picture = picture_of(packed, side)
    if picture is None:
        return None
    views = (View(0, 0, grid.index, grid.size, grid.features) for grid in picture.grids)
    return Layout((picture.tokens,), tuple(views))


def layout_of_grid(grid: tuple[int, int]) -> Layout:
    """Return the layout of one image in one sample, whose tokens are those of one grid."""
    return layout_of_frames(1, grid)


def layout_of_frames(frames: int, grid: tuple[int, int]) -> Layout:
    """Return the layout of one video in one sample, each frame of which is a grid."""
    index = np.arange(grid[0] * grid[1])
    starts = [frame * len(index) for frame in range(frames)]
    return Layout((frames * len(index),), tuple(View(0, 0, index + at, grid, index + at) for at in starts))


def layout_without_grid(counts: Sequence[int]) -> Layout:
    """Return a layout of so many tokens in each sample, in a row each: where nothing depends on where they stand."""
    numbers = [np.arange(count) for count in counts]
    views = (View(b, b, n, (1, len(n)), n) for b, n in enumerate(numbers) if len(n))
    return Layout(tuple(counts), tuple(views))


def _options(owner: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(owner.pack_image_features).parameters
    names = [name for name in OPTIONS if name in parameters]
    given = {name: arguments.get(name) for name in names}
    return {name: getattr(owner.config, name) if value is None else value for name, value in given.items()}


def _tiles(owner: PreTrainedModel, arguments: dict[str, Any], sizes: Tensor) -> list[int]:
    """Number of tiles of each image, the overview among them."""
    pack = inspect.unwrap(type(owner).pack_image_features)
    number_of_tiles = pack.__globals__["image_size_to_num_patches"]
    tiles = [
        number_of_tiles(size, owner.config.image_grid_pinpoints, owner.config.vision_config.image_size)
        for size in sizes
    ]
    if (images := arguments.get("batch_num_images")) is not None:
        is_single = [count == 1 for count in images for _ in range(count)]
        tiles = [count if single else 1 for count, single in zip(tiles, is_single, strict=True)]
    return tiles


def _tower_side(owner: PreTrainedModel) -> int:
    vision = owner.config.vision_config
    return int(vision.image_size // vision.patch_size)


def _runs(samples: list[Tensor]) -> list[int]:
    """Lengths of the runs of visual tokens without anything between them."""
    lengths: list[int] = []
    for rows in samples:
        borders = (rows.diff() != 1).nonzero().flatten() + 1
        lengths += [len(run) for run in torch.tensor_split(rows, borders) if len(run)]
    return lengths


def _parameters(module: PreTrainedModel) -> Iterable[str]:
    return inspect.signature(inspect.unwrap(type(module).forward)).parameters
