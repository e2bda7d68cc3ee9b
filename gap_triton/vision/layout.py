"""The position of each visual token in its image, and the row of the vision tower's output that it comes from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arguments import VISUAL_GRID
from ..introspect import text_model_of
from ..vision_tower import encoder_outputs
from ..vision_tower.finding import (
    GRID_FIELDS,
    PIXEL_FIELDS,
    image_shape,
    packs,
    patch_size_of,
    pooling_of,
    resamples,
)

NEWLINE = -1.0
ALTERNATIVE = (
    "choose a score and a coverage that don't ask where visual tokens stand, as presets 'text' and 'fastv' do"
)


@dataclass(frozen=True)
class View:
    """One regular grid of visual tokens: an image, the overview or the details of one, a frame of a video.

    Attributes:
        sample: Row of the batch.
        image: Number of the image or video in the batch, in order of appearance; its views share it.
        rows: [N] int64, rows of the prompt that hold its tokens, in raster order.
        grid: (H, W), H * W == N.
        features: [N] int64, the rows of `TowerOutput` that they come from.
    """

    sample: int
    image: int
    rows: Tensor
    grid: tuple[int, int]
    features: Tensor


@dataclass(frozen=True)
class Layout:
    """The positions of a prompt's visual tokens in their images.

    Attributes:
        views: All grids, in order of appearance.
        unplaced: [B, Q] bool, visual rows that are in no grid, such as the newlines of LLaVA-NeXT.
    """

    views: tuple[View, ...]
    unplaced: Tensor


@dataclass(frozen=True)
class _Grid:
    """A grid among the tokens of one image: its size, and by cell the number of its token in the image and its feature."""

    size: tuple[int, int]
    index: Tensor
    features: Tensor


@dataclass(frozen=True)
class _Picture:
    """One image or video: how many tokens of the prompt it takes, and the grids among them."""

    tokens: int
    grids: tuple[_Grid, ...]


def layout_of(
    owner: PreTrainedModel,
    kwargs: dict[str, Any],
    visual: Tensor,
    visual_index: Tensor,
    counts: Sequence[int],
) -> Layout:
    """Find the grid of every image in a prompt. Reads the visual rows from the device once.

    Args:
        owner: The module that receives ``input_ids``.
        kwargs: Its keyword arguments, ``input_ids`` among them where it was given.
        visual: [B, Q] bool, the visual tokens.
        visual_index: [B, V] int64, their rows, ascending, then -1.
        counts: Number of visual tokens of each sample.

    Raises:
        ValueError: The grids aren't known; the sentence says what is missing, and what can be done instead.
    """
    arguments = dict(kwargs)
    for encoded in encoder_outputs(kwargs).values():
        arguments |= {name: value for name, value in encoded.arguments.items() if value is not None}
    samples = [rows[:count] for rows, count in zip(visual_index.cpu(), counts, strict=True)]
    copies = _copies(kwargs, arguments, samples)
    pictures = _pictures(owner, arguments, samples[::copies])
    kinds = _kinds(owner, arguments, pictures, samples, visual.shape[1])
    grid_views = _assign_rows(pictures, samples, kinds, copies)

    unplaced = visual.clone()
    if not grid_views:
        return Layout((), unplaced)
    # One copy to the device for all of them.
    sizes = [len(view.rows) for view in grid_views]
    samples_of = torch.repeat_interleave(
        torch.tensor([view.sample for view in grid_views]), torch.tensor(sizes)
    )
    rows, features = (
        torch.cat([view.rows for view in grid_views]),
        torch.cat([view.features for view in grid_views]),
    )
    samples_of, rows, features = torch.stack([samples_of, rows, features]).to(visual.device)
    unplaced[samples_of, rows] = False
    pieces = zip(grid_views, rows.split(sizes), features.split(sizes), strict=True)
    views = (replace(view, rows=rows, features=features) for view, rows, features in pieces)
    return Layout(tuple(views), unplaced)


# --------------------------------------------------------------------------------------------- placing
def _assign_rows(
    pictures: dict[str, list[_Picture]], samples: list[Tensor], kinds: list[dict[str, Tensor]], copies: int
) -> list[View]:
    """Assign the rows of the samples to the pictures, both in order; each ``copies`` samples share their pictures."""
    pieces: list[tuple[int, int, _Picture, Tensor]] = []  # sample, first row, picture, rows
    for kind, queue in pictures.items():
        cursor = 0
        for first in range(0, len(samples), copies):
            number = cursor
            for sample in range(first, first + copies):
                number, rows, start = cursor, kinds[sample][kind], 0
                while start < len(rows):
                    if number == len(queue) or start + queue[number].tokens > len(rows):
                        raise ValueError(
                            f"sample {sample} has {len(rows)} visual tokens of its {kind}s, which the sizes of the "
                            f"{len(queue)} {kind}s given with the prompt don't add up to: pass them in the order of the "
                            f"prompt, or {ALTERNATIVE}"
                        )
                    piece = rows[start : start + queue[number].tokens]
                    pieces.append((sample, int(piece[0]), queue[number], piece))
                    start, number = start + len(piece), number + 1
            cursor = number
        if cursor < len(queue):
            raise ValueError(
                f"{len(queue)} {kind}s were given with the prompt, whose visual tokens belong to {cursor}: pass those of "
                f"the prompt only, or {ALTERNATIVE}"
            )
    pieces.sort(key=lambda piece: piece[:2])
    return [
        View(sample, image, rows[grid.index], grid.size, grid.features)
        for image, (sample, _, picture, rows) in enumerate(pieces)
        for grid in picture.grids
    ]


def _copies(kwargs: dict[str, Any], arguments: dict[str, Any], samples: list[Tensor]) -> int:
    """How many copies of each sample follow each other: ``generate()`` repeats prompts, but not their images."""
    encoded, visual_grid = encoder_outputs(kwargs), arguments.get(VISUAL_GRID)
    if encoded:
        recorded = sum(each.tokens for each in encoded.values())
    elif isinstance(visual_grid, list):
        recorded = sum(height * width for height, width in visual_grid)
    else:
        return 1
    visual = sum(map(len, samples))
    if recorded in (0, visual):
        return 1
    copies = visual // recorded
    same = (
        all(torch.equal(rows, samples[i - i % copies]) for i, rows in enumerate(samples)) if copies else False
    )
    right = copies * recorded == visual and len(samples) % copies == 0 and same
    if encoded and not right:
        raise ValueError(
            f"the prompt has {visual} visual tokens, and {recorded} were encoded ahead of it: pass the whole prompt at "
            f"once, without prefill_chunk_size, or {ALTERNATIVE}"
        )
    return copies if right and (encoded or _repeat(arguments, copies)) else 1


def _repeat(arguments: dict[str, Any], copies: int) -> bool:
    """Whether each ``copies`` samples in a row have the same input. One read."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    groups = (ids if ids is not None else embeds).unflatten(0, (-1, copies))  # type: ignore[union-attr]
    same = (groups == groups[:, :1]) | (groups != groups)  # NaN equals NaN
    return bool(same.all())


def _kinds(
    owner: PreTrainedModel,
    arguments: dict[str, Any],
    pictures: dict[str, list[_Picture]],
    samples: list[Tensor],
    queries: int,
) -> list[dict[str, Tensor]]:
    """The visual rows of each sample, of images and of videos."""
    if len(pictures) == 1:
        ((only, _),) = pictures.items()
        return [{only: rows} for rows in samples]
    types, ids = arguments.get("mm_token_type_ids"), arguments.get("input_ids")
    video = getattr(owner.config, "video_token_id", None)
    if types is not None:
        shows_video = (types == 2).cpu()
    elif ids is not None and video is not None:
        shows_video = (ids == video).cpu()
    else:
        raise ValueError(
            "images and videos in one prompt are told apart by mm_token_type_ids, or by the ids of their placeholders: pass "
            f"mm_token_type_ids or input_ids, or {ALTERNATIVE}"
        )
    shows_video = shows_video[:, -queries:]
    return [
        {"image": rows[~shows_video[i, rows]], "video": rows[shows_video[i, rows]]}
        for i, rows in enumerate(samples)
    ]


# --------------------------------------------------------------------------------------------- sizes
def _pictures(
    owner: PreTrainedModel, arguments: dict[str, Any], samples: list[Tensor]
) -> dict[str, list[_Picture]]:
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
        visual_grid = _by_patches(owner, arguments, _runs(samples))
    visual, shape = sum(map(len, samples)), image_shape(arguments)
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
    return _by_grids({"image": [[1, height, width] for height, width in grids]}, 1)


def _by_the_model(owner: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, list[_Picture]] | None:
    """The images and videos of a prompt where the model gets, or sets, the size of each; else None."""
    grids = {kind: arguments[name] for kind, name in GRID_FIELDS.items() if arguments.get(name) is not None}
    if grids:
        return _by_grids({kind: sizes.tolist() for kind, sizes in grids.items()}, _merge_size(owner))
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
    patch = patch_size_of(getattr(owner.config, "vision_config", None))
    if arguments.get("image_sizes") is not None and "image_sizes" in _parameters(owner) and patch is not None:
        sizes = [
            [1, height // patch[0], width // patch[1]]
            for height, width in torch.as_tensor(arguments["image_sizes"]).tolist()
        ]
        return _by_grids({"image": sizes}, pooling_of(owner))
    return None


def _by_patches(owner: PreTrainedModel, arguments: dict[str, Any], runs: list[int]) -> tuple[int, int]:
    """Rows and columns of visual tokens of each image where all are of one size: LLaVA and most others.

    They are those of the tower's patches, or of squares of them as the config says. That is checked by their number,
    which does not suffice alone: 256 tokens may be 16 x 16 or, as in MiniGPT-v2, 32 x 8.
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
    tokens, visual = grid[0] * grid[1], sum(runs)
    whole = tokens * pool**2 == size[0] * size[1] > 0
    images = None if shape is None else shape[0]
    if not whole or any(run % tokens for run in runs) or (images is not None and images * tokens != visual):
        each = "an image" if images is None else f"each of {images} images"
        raise ValueError(
            f"{name} has {visual} visual tokens, and {each} of {size[0]} x {size[1]} patches makes {grid[0]} x {grid[1]} "
            f"by its config, so how many rows and columns they make is not known: {alternative}"
        )
    return grid


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


def _by_grids(grids: dict[str, list[list[int]]], merge: int) -> dict[str, list[_Picture]]:
    """Pictures of given sizes (frames, rows and columns of patches); squares become a token, and each frame a grid."""
    pictures: dict[str, list[_Picture]] = {}
    feature = 0
    for kind, sizes in grids.items():
        pictures[kind] = []
        for frames, height, width in sizes:
            size = (height // merge, width // merge)
            cells = torch.arange(size[0] * size[1])
            starts = [frame * len(cells) for frame in range(frames)]
            views = tuple(_Grid(size, cells + start, cells + start + feature) for start in starts)
            pictures[kind].append(_Picture(frames * len(cells), views))
            feature += frames * len(cells)
    return pictures


def _merge_size(owner: PreTrainedModel) -> int:
    config = owner.config
    configs = (getattr(config, "vision_config", None), config)
    merge = next(
        (m for each in configs if (m := getattr(each, "spatial_merge_size", None)) is not None), None
    )
    if merge is None:
        raise ValueError(
            f"the config of {type(owner).__name__} has no spatial_merge_size, so how many patches make one visual token is "
            f"not known: {ALTERNATIVE}"
        )
    return int(merge)


def _packed(owner: PreTrainedModel, arguments: dict[str, Any]) -> list[_Picture]:
    """Overview, then tiles joined and cropped, with a newline after each row: LLaVA-NeXT and similar.

    The model's own method runs on the numbers of the feature rows instead of the features.
    """
    sizes = arguments.get("image_sizes")
    if sizes is None:
        raise ValueError(
            f"{type(owner).__name__} was not given image_sizes, so how it has cut its images into tiles is not known: pass "
            f"image_sizes with the prompt, as the processor makes it, or {ALTERNATIVE}"
        )
    sizes = sizes.cpu() if isinstance(sizes, Tensor) else torch.tensor(sizes)
    side = _tower_side(owner)
    tiles = _tiles(owner, arguments, sizes)
    numbers = torch.arange(sum(tiles) * side * side, dtype=torch.float64).unflatten(0, (-1, side * side))
    # Beside each number its square: an average of several numbers is not one of them, even where it is an integer.
    features = torch.stack([numbers, numbers.square()], dim=-1).split(tiles)  # each [tiles, N, 2]
    packed, _ = owner.pack_image_features(
        features,
        sizes,
        image_newline=torch.tensor([NEWLINE, NEWLINE**2], dtype=torch.float64),
        **_options(owner, arguments),
    )
    return [_picture_of(image[:, 0], image[:, 1], side) for image in packed]


def _options(owner: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(owner.pack_image_features).parameters
    names = [name for name in ("vision_feature_select_strategy", "vision_aspect_ratio") if name in parameters]
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


def _picture_of(numbers: Tensor, squares: Tensor, side: int) -> _Picture:
    if not torch.equal(numbers.square(), squares):
        raise ValueError(
            "an image is larger than the model takes, so that it interpolates between the vision tower's features, and its "
            f"visual tokens are not those of the tower: pass a smaller image, or {ALTERNATIVE}"
        )
    features = numbers.round().long()
    grids = [_Grid((side, side), torch.arange(side * side), features[: side * side])]
    details = features[side * side :]
    newlines = (details == NEWLINE).nonzero().flatten()
    index = (details != NEWLINE).nonzero().flatten()
    if len(index):
        grids.append(_Grid((len(newlines), len(index) // len(newlines)), index + side * side, details[index]))
    return _Picture(len(features), tuple(grids))


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
