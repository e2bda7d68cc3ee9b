"""What a vision tower tells of the visual tokens, against an eager run of it; where they stand, against marked pixels."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support import families, model_types, tiny
from support.tiny import BOS, IMAGE, IMAGE_SIZE, PATCH, VIDEO
from support.towers import (
    GRID_MODELS,
    MERGE,
    PICTURES,
    Eager,
    captured,
    family,
    grid_model,
    grid_prompt,
    told_by_eager,
)
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gap_triton.integration.supported_models import find_parts
from gap_triton.prefill.prompt import find_visual_rows
from gap_triton.vision.layout import layout_of as layout_in_tokens
from gap_triton.vision.pictures import picture_of
from gap_triton.vision_tower import TowerOutput, TowerRecorder, check_needs, find_tower, install

ALL = frozenset({"received", "key_norm", "keys", "similarity"})
OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "proj", "projection_layer")  # of the attention of vision towers
CLIP = {**tiny.VISION, "num_hidden_layers": 6}


# --------------------------------------------------------------------------------------------- watching
@dataclass
class Seen:
    """What one forward of the decoder saw."""

    output: TowerOutput | None = None
    layout: Layout | None = None
    door: Tensor | None = None  # [B, Q, C], what enters the decoder
    visual: Tensor | None = None
    errors: list[str] = field(default_factory=list)


def index_of(visual: Tensor) -> tuple[Tensor, list[int]]:
    """Rows of the visual tokens by sample, ascending, then -1, and how many there are."""
    counts = visual.sum(dim=1).tolist()
    index = torch.full((len(counts), max(counts)), -1)
    for sample, count in enumerate(counts):
        index[sample, :count] = visual[sample].nonzero().flatten()
    return index, counts


@dataclass(frozen=True)
class Placed:
    """A view, with the rows of the prompt that hold its tokens."""

    sample: int
    image: int
    rows: Tensor
    grid: tuple[int, int]
    features: Tensor


@dataclass(frozen=True)
class Layout:
    """What `layout_in_tokens` gives, in rows of the prompt."""

    views: tuple[Placed, ...]
    unplaced: Tensor


def layout_of(
    owner: PreTrainedModel, given: dict[str, Any], visual: Tensor, index: Tensor, counts: list[int]
) -> Layout:
    layout = layout_in_tokens(owner, given, visual, index, counts)
    views = [
        Placed(
            view.sample,
            view.image,
            index[view.sample, torch.from_numpy(view.numbers)],
            view.grid,
            torch.from_numpy(view.features),
        )
        for view in layout.views
    ]
    unplaced = torch.zeros_like(visual)
    for sample, tokens in enumerate(layout.unplaced()):
        unplaced[sample, index[sample, torch.from_numpy(tokens)]] = True
    return Layout(tuple(views), unplaced)


@contextlib.contextmanager
def watched(model: PreTrainedModel, needs: frozenset[str]) -> Iterator[list[Seen]]:
    """Everything that prompts of ``model`` show inside the block, one entry each."""
    owner, text = find_parts(model)
    tower = find_tower(owner)
    check_needs(tower, needs)
    seen: list[Seen] = []
    entering: list[Any] = []  # hooks of forwards that failed before the decoder are still there

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        rows = find_visual_rows(owner, ids, kwargs.get("inputs_embeds"))
        if rows is None:
            return
        for stale in entering:
            stale.remove()
        watch = TowerRecorder(tower, needs)
        watch.start(kwargs)
        seen.append(Seen(visual=rows.mask))

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given=kwargs) -> None:
            handle.remove()
            watch.stop()
            seen[-1].door = kwargs["inputs_embeds"]
            seen[-1].output = watch.output()
            seen[-1].layout = layout_of(owner, {"input_ids": ids, **given}, rows.mask, *index_of(rows.mask))

        handle = text.register_forward_pre_hook(enter, with_kwargs=True)
        entering.append(handle)

    handles = [*install(tower, lambda: needs), owner.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def look(model: PreTrainedModel, inputs: dict[str, Tensor], needs: frozenset[str] = ALL) -> Seen:
    with watched(model, needs) as seen, torch.no_grad():
        model(**inputs)
    (only,) = seen
    return only


# --------------------------------------------------------------------------------------------- LLaVA
def llava(
    vision: transformers.PreTrainedConfig | None = None, layer: int | list[int] = -2
) -> PreTrainedModel:
    vision = vision or transformers.CLIPVisionConfig(**CLIP)
    config = transformers.LlavaConfig(
        text_config=tiny.text_config("llama"),
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full" if "siglip" in vision.model_type else "default",
    )
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return tiny.seed_weights(model)


def siglip() -> transformers.PreTrainedConfig:
    return transformers.SiglipVisionConfig(**CLIP)


THREE = ((tiny.Image(),), (tiny.Image(), tiny.Image()))


def eager_tower(model: PreTrainedModel, pixels: Tensor, layer: int, leading: int) -> dict[str, Tensor]:
    """What a tower of CLIP's kind tells, from its own weights and states in eager attention."""
    tower = find_parts(model).owner.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    keys = [module for name, module in tower.named_modules() if name.endswith("k_proj")]
    with captured(keys) as projected, torch.no_grad():
        run = tower(pixels, output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation(before)
    attention, key = run.attentions[layer].mean(dim=1), projected[layer]
    states = run.hidden_states[len(run.attentions) - len(run.attentions) // 3 :]
    rows = slice(leading, None)
    return {
        "cls": attention[:, 0, rows].flatten(),
        "received": attention.mean(dim=1)[:, rows].flatten(),
        "keys": key[:, rows].flatten(0, 1),
        "key_norm": key[:, rows].norm(dim=-1).flatten(),
        "similarity": torch.stack(states).mean(dim=0)[:, rows].flatten(0, 1),
        "features": run.hidden_states[layer + 1 if layer >= 0 else layer][:, rows].flatten(0, 1),
    }


@pytest.mark.parametrize(("layer", "scoring"), [(-2, -2), (-1, -1), (3, 2), ([-5, -3], -3)])
def test_a_clip_tower_tells_what_an_eager_one_shows(layer: int | list[int], scoring: int) -> None:
    model = llava(layer=layer)
    inputs = tiny.prompt("llava", images=THREE)
    output = look(model, inputs, ALL | {"cls", "features"}).output
    expected = eager_tower(model, inputs["pixel_values"], scoring, leading=1)
    for need in sorted(ALL | {"cls"}):
        torch.testing.assert_close(getattr(output, need), expected[need], rtol=1e-4, atol=1e-5)
    if isinstance(layer, int):
        torch.testing.assert_close(output.features, expected["features"], rtol=1e-4, atol=1e-5)


def test_a_tower_without_cls_tells_what_an_eager_one_shows() -> None:
    model = llava(siglip())
    inputs = tiny.prompt("llava", images=THREE)
    output = look(model, inputs, ALL | {"features"}).output
    expected = eager_tower(model, inputs["pixel_values"], -2, leading=0)
    for need in sorted(ALL | {"features"}):
        torch.testing.assert_close(getattr(output, need), expected[need], rtol=1e-4, atol=1e-5)


def test_a_first_patch_that_the_model_leaves_out_is_left_out() -> None:
    """As it is where a tower without a CLS token meets the strategy for one that has it."""
    model = llava(siglip())
    model.config.vision_feature_select_strategy = "default"
    owner, pixels = find_parts(model).owner, tiny.prompt("llava")["pixel_values"]
    tower = find_tower(owner)
    handles, watch = install(tower), TowerRecorder(tower, ALL)
    watch.start()
    with torch.no_grad():
        owner.get_image_features(pixels)
    watch.stop()
    for handle in handles:
        handle.remove()
    expected = eager_tower(model, pixels, -2, leading=1)
    for need in sorted(ALL):
        torch.testing.assert_close(getattr(watch.output(), need), expected[need], rtol=1e-4, atol=1e-5)


def test_projected_features_are_what_enters_the_decoder() -> None:
    seen = look(llava(), tiny.prompt("llava", images=THREE), frozenset({"features"}))
    for view in seen.layout.views:
        projected = seen.output.project(seen.output.features[view.features])
        torch.testing.assert_close(projected, seen.door[view.sample, view.rows])


# --------------------------------------------------------------------------------------------- layouts
def without_mixing(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with a vision tower whose attention adds nothing, so that a patch reaches no row but its own."""
    tower = find_tower(find_parts(model).owner)
    for module in (module for layer in tower.layers for module in layer.modules()):
        for name, child in module.named_children():
            # Some have a linear layer of their own kind.
            if name == "o_proj" or (name in OUTPUT_PROJECTIONS and isinstance(child, nn.Linear)):
                for parameter in child.parameters():
                    nn.init.zeros_(parameter)
    return model


def changed(before: Tensor, after: Tensor) -> list[list[int]]:
    """Where a row differs, by all axes but the last."""
    return (before != after).any(dim=-1).nonzero().tolist()


def check_marks(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    mark: Callable[[dict[str, Tensor], int, int, int, int], dict[str, Tensor]],
) -> Layout:
    """A marked cell of a view changes the row and the feature that the layout gives it, and no other.

    ``mark(inputs, image, view, row, column)`` are ``inputs`` with other pixels in that cell.
    """
    needs = frozenset({"similarity"})
    seen = look(model, inputs, needs)
    numbers: dict[int, int] = {}
    for view in seen.layout.views:
        number = numbers[view.image] = numbers.get(view.image, -1) + 1
        height, width = view.grid
        for row, column in {(0, 0), (height - 1, 0), (height // 2, width - 1), (height - 1, width - 1)}:
            again = look(model, mark(inputs, view.image, number, row, column), needs)
            cell = row * width + column
            assert changed(seen.door, again.door) == [[view.sample, int(view.rows[cell])]]
            assert changed(seen.output.similarity, again.output.similarity) == [[int(view.features[cell])]]
    placed = torch.zeros_like(seen.visual)
    for view in seen.layout.views:
        assert view.rows.shape == view.features.shape == (view.grid[0] * view.grid[1],)
        assert not placed[view.sample, view.rows].any()
        placed[view.sample, view.rows] = True
    assert torch.equal(seen.layout.unplaced, seen.visual & ~placed)
    return seen.layout


def mark_patch(inputs: dict[str, Tensor], image: int, view: int, row: int, column: int) -> dict[str, Tensor]:
    pixels = inputs["pixel_values"].clone()
    tile = pixels[image] if pixels.dim() == 4 else pixels[image, view]
    tile[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1.0
    return {**inputs, "pixel_values": pixels}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("vision", [None, siglip()], ids=["clip", "siglip"])
def test_layout_of_square_images(vision: transformers.PreTrainedConfig | None, padding: str) -> None:
    model = without_mixing(llava(vision))
    inputs = tiny.prompt("llava", images=THREE, padding=padding)
    layout = check_marks(model, inputs, mark_patch)
    assert [(view.sample, view.image, view.grid) for view in layout.views] == [
        (0, 0, (6, 6)),
        (1, 1, (6, 6)),
        (1, 2, (6, 6)),
    ]
    assert not layout.unplaced.any()


def test_images_need_no_text_between_them() -> None:
    ids = torch.tensor([[BOS, *[IMAGE] * 72, 7, 8]])
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    layout = check_marks(without_mixing(llava()), {"input_ids": ids, "pixel_values": pixels}, mark_patch)
    assert [view.rows[0].item() for view in layout.views] == [1, 37]


# Images of LLaVA-NeXT by size: tiles of the details, and how many rows and columns of patches are padding in front.
TILED = {
    (24, 48): ((1, 2), (0, 0)),
    (48, 48): ((2, 2), (0, 0)),
    (24, 40): ((1, 2), (0, 1)),
    (40, 24): ((2, 1), (1, 0)),
}


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_layout_of_tiled_images(name: str) -> None:
    sizes = [(24, 40), (48, 48), (40, 24), (24, 48)]
    images = [tiny.Image(*size) for size in sizes]
    inputs = tiny.prompt(name, images=(images[:1], images[1:]))
    pixels = torch.randn(4, 5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))

    def mark(inputs: dict[str, Tensor], image: int, view: int, row: int, column: int) -> dict[str, Tensor]:
        if view == 0:
            return mark_patch(inputs, image, 0, row, column)
        (_, columns), (above, left) = TILED[sizes[image]]
        row, column = row + above, column + left
        tile = 1 + row // tiny.GRID * columns + column // tiny.GRID
        return mark_patch(inputs, image, tile, row % tiny.GRID, column % tiny.GRID)

    layout = check_marks(without_mixing(tiny.build(name)), inputs | {"pixel_values": pixels}, mark)
    grids = [(6, 10), (12, 12), (10, 6), (6, 12)]
    assert [view.grid for view in layout.views] == [grid for each in grids for grid in ((6, 6), each)]
    assert [view.image for view in layout.views] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert layout.unplaced.sum(dim=1).tolist() == [6, 12 + 10 + 6]  # newlines


# --------------------------------------------------------------------------------------------- grids
def mark_grid(inputs: dict[str, Tensor], image: int, view: int, row: int, column: int) -> dict[str, Tensor]:
    """Other pixels in one of the four patches of a token. Processors put the patches of a token next to each other."""
    pictures = [picture for sample in PICTURES for picture in sample]
    kind, (_, height, width) = pictures[image]
    start = sum(f * h * w for each, (f, h, w) in pictures[:image] if each == kind) + view * height * width
    patch = start + (row * (width // MERGE) + column) * MERGE**2 + (row + column) % MERGE**2
    field = "pixel_values" if kind == "image" else "pixel_values_videos"
    pixels = inputs[field].clone()
    pixels[patch] += 1.0
    return {**inputs, field: pixels}


@pytest.mark.parametrize("name", GRID_MODELS)
def test_layout_of_images_and_videos_with_grids(name: str) -> None:
    model = without_mixing(grid_model(name))
    layout = check_marks(model, grid_prompt(model), mark_grid)
    assert [(view.sample, view.image, view.grid) for view in layout.views] == [
        (0, 0, (3, 4)),
        (1, 1, (2, 5)),
        (1, 2, (2, 3)),
        (1, 2, (2, 3)),
        (1, 3, (5, 3)),
    ]
    assert not layout.unplaced.any()


# --------------------------------------------------------------------------------------------- other types
KINDS = {**model_types.IMAGES, **model_types.IMAGES_BEFORE}


def installed_types() -> list[str]:
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    since = {name: tuple(map(int, each.split("."))) for name, each in model_types.IMAGES_SINCE.items()}
    known = [name for name in KINDS if name in families.TYPES and release >= since.get(name, ())]
    return [name for name in known if name != "perception_lm" or release >= (5, 23)]  # needs timm before


@pytest.mark.parametrize("name", [n for n in installed_types() if n not in model_types.TOWERS_REFUSED])
def test_a_marked_patch_is_found_where_it_stands(name: str) -> None:
    """The row that changes is that of the patch's cell, and the feature of that row is the one that changes."""
    model, kind = family(name), KINDS[name]
    inputs = families.prompt_with_pixels(model, kind)
    without_mixing(model)
    seen = look(model, inputs)
    pixels = inputs["pixel_values"]
    for number, row, column in ((0, 1, 3), (1, 5, 0), (2, 2, 5)):
        changed_pixels = pixels.clone()
        if "patches" in kind:
            height, width = families.GRID[1:]
            cell, size = (row // MERGE, column // MERGE), (height // MERGE, width // MERGE)
            in_token = row % MERGE * MERGE + column % MERGE
            patch = (cell[0] * size[1] + cell[1]) * MERGE**2 + in_token
            if kind == "square patches":  # in raster order
                patch = row * width + column
            if changed_pixels.dim() == 3:  # by image, in raster order
                changed_pixels[number, row * width + column] += 1.0
            else:
                changed_pixels[number * height * width + patch] += 1.0
        else:
            size = seen.layout.views[number].grid
            cell = (row * size[0] // tiny.GRID, column * size[1] // tiny.GRID)
            real = changed_pixels.flatten(-3).any(dim=-1)  # others fill samples up
            images = changed_pixels[real]
            images[number, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1.0
            changed_pixels[real] = images
        again = look(model, inputs | {"pixel_values": changed_pixels})
        view = seen.layout.views[number]
        assert view.grid == size
        place = cell[0] * size[1] + cell[1]
        assert changed(seen.door, again.door) == [[view.sample, int(view.rows[place])]]
        assert changed(seen.output.similarity, again.output.similarity) == [[int(view.features[place])]]


@pytest.mark.parametrize("name", [n for n in installed_types() if n in model_types.TOWERS_REFUSED])
def test_towers_that_cannot_tell_are_refused(name: str) -> None:
    model = family(name)
    with pytest.raises(ValueError, match=model_types.TOWERS_REFUSED[name]):
        look(model, families.prompt_with_pixels(model, KINDS[name]))


@pytest.mark.parametrize("name", GRID_MODELS)
def test_a_merging_tower_tells_what_an_eager_one_shows(name: str) -> None:
    model = grid_model(name)
    inputs = grid_prompt(model)
    output = look(model, inputs).output
    for need, rows in told_by_eager(model, inputs).items():
        torch.testing.assert_close(getattr(output, need), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("lfm3_vl" not in installed_types(), reason="this transformers has no LFM3-VL")
def test_layers_without_attention_are_passed_over() -> None:
    """Convolutions inside of a tower: the last layer that attends scores, and of the earlier ones the nearest."""
    config = families.config_of("lfm3_vl")
    config.vision_config.num_hidden_layers = 6
    config.vision_config.layer_types = ["conv", "full_attention", "conv", "full_attention", "conv", "conv"]
    owner = transformers.Lfm3VlForConditionalGeneration._from_config(config).model
    tower, layers = find_tower(owner), owner.vision_tower.layers
    assert tower.attention is layers[3].self_attn
    assert set(tower.earlier.values()) == {layers[1].self_attn}


def test_images_in_one_sequence_are_scored_apart() -> None:
    """Pixtral's tower takes images of any size in one sequence, and its projector patches in raster order."""
    model = family("mistral3")
    sizes = torch.tensor([[24, 24], [16, 24], [24, 8]])
    grids = [(3, 3), (2, 3), (3, 1)]
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    pictures = [[IMAGE] * (height * width) for height, width in grids]
    ids = torch.tensor([[BOS, *pictures[0], 7, *pictures[1], 8, *pictures[2], 9]])
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}
    seen = look(model, inputs)
    assert [view.grid for view in seen.layout.views] == grids

    tower = find_parts(model).owner.vision_tower
    eager = Eager(find_tower(find_parts(model).owner).attention)
    AttentionInterface.register("written_down", eager)
    tower.set_attn_implementation("written_down")
    with torch.no_grad():
        tower(pixels, image_sizes=sizes)
    (weights,) = eager.weights
    patches = [4 * height * width for height, width in grids]
    received, keys = weights.mean(dim=0).split(patches, dim=1), eager.keys[0].split(patches)
    expected: dict[str, list[Tensor]] = {"received": [], "keys": []}
    for columns, key, count, (height, width) in zip(received, keys, patches, grids, strict=True):
        for need, rows in (("received", columns.sum(dim=0) / count), ("keys", key)):
            squares = rows.unflatten(0, (height, MERGE, width, MERGE)).mean(dim=(1, 3))
            expected[need].append(squares.flatten(0, 1))
    for need, parts in expected.items():
        torch.testing.assert_close(getattr(seen.output, need), torch.cat(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name in ("lfm2_vl", "gemma4", "llama4") if name in installed_types()]
)
def test_patches_of_padded_images_and_a_cls_token_that_comes_last(name: str) -> None:
    """LFM2-VL and Gemma 4 fill images up to one number of patches; Llama 4 puts its CLS token behind the patches."""
    model = family(name)
    inputs = families.prompt_with_pixels(model, KINDS[name])
    needs = frozenset(
        {"received", "keys", "key_norm", "similarity"} | ({"cls"} if name == "llama4" else set())
    )
    output = look(model, inputs, needs).output
    tower = find_tower(find_parts(model).owner)
    eager = EagerImages(tower.attention)
    AttentionInterface.register("written_down", eager)
    AttentionMaskInterface.register("written_down", sdpa_mask)
    tower.module.set_attn_implementation("written_down")
    with captured([*tower.layers[-1 - len(tower.layers) // 3 :]]) as states, torch.no_grad():
        model(**inputs)
    _, height, width = families.GRID if name != "llama4" else (1, tiny.GRID, tiny.GRID)
    patches = height * width
    last = [state[0] if isinstance(state, tuple) else state for state in states]

    def squares(rows: Tensor) -> Tensor:
        """[F, ...], the mean of each 2 x 2 patches of rows [images, S, ...]."""
        cells = rows[:, :patches].unflatten(1, (height // MERGE, MERGE, width // MERGE, MERGE))
        return cells.mean(dim=(2, 4)).flatten(0, 2)

    seen = eager.weights if name == "llama4" else eager.weights[:, :, :patches]
    expected = {
        "received": squares(seen.mean(dim=(1, 2))),
        "keys": squares(eager.keys),
        "key_norm": squares(eager.keys.norm(dim=-1)),
        "similarity": squares(torch.stack(last).mean(dim=0)),
    }
    if name == "llama4":
        expected["cls"] = squares(eager.weights[:, :, -1].mean(dim=1))
    for need, rows in expected.items():
        torch.testing.assert_close(getattr(output, need), rows, rtol=1e-4, atol=1e-5)


@dataclass
class EagerImages:
    """An attention function that writes down weights [images, H, S, S] and keys [images, S, H * D]."""

    module: nn.Module
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        logits = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        if attention_mask is not None:
            hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        weights = logits.softmax(dim=-1)
        if module is self.module:
            self.weights, self.keys = weights, key.transpose(1, 2).flatten(2)
        return (weights @ value).transpose(1, 2), None


# --------------------------------------------------------------------------------------------- generation
AHEAD = "mm_encoder_outputs" in inspect.signature(transformers.LlavaModel.forward).parameters


def same(first: TowerOutput, second: TowerOutput, needs: frozenset[str]) -> bool:
    return all(torch.equal(getattr(first, need), getattr(second, need)) for need in needs)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_shows_what_a_forward_shows(name: str, beams: int) -> None:
    """Also where it encodes images ahead of the forward, which then is told neither pixels nor their sizes."""
    model = grid_model(name) if name in GRID_MODELS else tiny.build(name)
    picture = (tiny.Image(24, 48) if name != "llava" else tiny.Image(),)
    inputs = grid_prompt(model) if name in GRID_MODELS else tiny.prompt(name, images=(picture, picture * 2))
    if beams > 1 and not AHEAD and name in tiny.CLASSES:
        inputs = tiny.prompt(name, images=(picture, picture))  # several images of a sample are mixed up there
    forward = look(model, inputs)
    with watched(model, ALL) as seen:
        tiny.generate(model, inputs, tokens=2, num_beams=beams)
    (prefill,) = seen
    copies = [prefill.layout.views[:], forward.layout.views]
    if beams == 1 or AHEAD:
        assert same(prefill.output, forward.output, ALL)
    for sample in range(len(prefill.visual)):
        got = [view for view in copies[0] if view.sample == sample]
        expected = [view for view in copies[1] if view.sample == sample // beams]
        assert [view.grid for view in got] == [view.grid for view in expected]
        for ours, theirs in zip(got, expected, strict=True):
            shift = prefill.visual.shape[1] - forward.visual.shape[1]
            assert torch.equal(ours.rows, theirs.rows + shift)
            similar = prefill.output.similarity[ours.features], forward.output.similarity[theirs.features]
            torch.testing.assert_close(*similar)
    assert len({view.image for view in copies[0]}) == beams * len({view.image for view in copies[1]})


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = llava()
    inputs = tiny.prompt("llava")
    with watched(model, ALL) as seen:
        with pytest.raises(ValueError, match="tokens"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
        tiny.generate(model, inputs, tokens=2)
    assert same(seen[-1].output, look(model, inputs).output, ALL)


@pytest.mark.skipif(not AHEAD, reason="this release encodes images in the forward")
def test_chunks_of_a_prompt_are_refused() -> None:
    model = tiny.build("llava")
    with (
        watched(model, ALL),
        pytest.raises(ValueError, match="pass pixel_values with the prompt"),
    ):
        tiny.generate(model, tiny.prompt("llava"), tokens=2, prefill_chunk_size=16)


def test_threads_see_their_own_images() -> None:
    model = llava()
    prompts = [
        tiny.prompt("llava", images=((tiny.Image(),), (tiny.Image(),)), seed=seed) for seed in range(6)
    ]
    expected = [look(model, inputs) for inputs in prompts]
    start = threading.Barrier(len(prompts))

    def run(inputs: dict[str, Tensor], watch: TowerRecorder) -> TowerOutput:
        start.wait()
        for _ in range(5):
            watch.start()
            with torch.no_grad():
                model(**inputs)
            watch.stop()
        return watch.output()

    tower = find_tower(find_parts(model).owner)
    handles = install(tower)
    watches = [TowerRecorder(tower, ALL) for _ in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        outputs = list(pool.map(run, prompts, watches))
    for handle in handles:
        handle.remove()
    for output, seen in zip(outputs, expected, strict=True):
        for need in ALL:
            torch.testing.assert_close(getattr(output, need), getattr(seen.output, need))


# --------------------------------------------------------------------------------------------- installing
def hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks


@pytest.mark.parametrize("before", ["sdpa", "eager", "gap_triton"])
def test_a_tower_is_left_as_it_was(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("gap_triton.integration.attention.logger.warning_once", warnings.append)
    model = tiny.build("llava", {"text_config": "sdpa", "vision_config": before})
    owner = find_parts(model).owner
    tower = find_tower(owner)
    inputs = tiny.prompt("llava")
    with torch.no_grad():
        expected = model(**inputs).logits
    plain = [(vars(module).copy(), *map(len, hooks_of(module))) for module in owner.modules()]
    handles = install(tower)
    assert tower.module.config._attn_implementation == "gap_triton"
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected)
    for handle in handles:
        handle.remove()
    assert tower.module.config._attn_implementation == before
    for module, (variables, *hooks) in zip(owner.modules(), plain, strict=True):
        assert vars(module).keys() == variables.keys()
        assert [len(each) for each in hooks_of(module)] == hooks
    assert not warnings


def test_nothing_is_recorded_without_need() -> None:
    model = llava()
    owner = find_parts(model).owner
    handles = install(find_tower(owner))
    with torch.no_grad():
        features = owner.get_image_features(tiny.prompt("llava")["pixel_values"])
    assert not hasattr(features, "_gap_encoded")
    for handle in handles:
        handle.remove()


def test_a_watch_is_for_its_own_tower() -> None:
    model, other = llava(siglip()), llava()
    tower = find_tower(find_parts(model).owner)
    handles = install(tower)
    watch = TowerRecorder(find_tower(find_parts(other).owner), frozenset({"cls"}))
    watch.start()
    with torch.no_grad():
        features = tower.owner.get_image_features(tiny.prompt("llava")["pixel_values"])
    watch.stop()
    for handle in handles:
        handle.remove()
    assert not watch.encoded
    assert not hasattr(features, "_gap_encoded")


def test_a_copy_of_a_model_watches_its_own_tower() -> None:
    model = llava()
    inputs = tiny.prompt("llava")
    handles = install(find_tower(find_parts(model).owner))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in find_parts(twin).owner.vision_tower.parameters():
            parameter.mul_(1.5)
        encoded = find_parts(twin).owner.get_image_features(inputs["pixel_values"])
        plain = find_parts(model).owner.get_image_features(inputs["pixel_values"])
    for handle in handles:
        handle.remove()
    first, second = (getattr(each, "pooler_output", each)[0] for each in (encoded, plain))
    assert not torch.allclose(first, second)


# --------------------------------------------------------------------------------------------- refusals
def test_a_cls_score_needs_a_cls_token() -> None:
    tower = find_tower(find_parts(llava(siglip())).owner)
    with pytest.raises(ValueError, match=r"SiglipVisionModel has no CLS token.*use score='received'"):
        check_needs(tower, frozenset({"cls"}))


def test_a_tower_without_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a bundle of compiled files. Its CLS token comes first, but where the tower itself puts it somewhere."""

    def fail(function: object) -> str:
        raise OSError("could not get source code")

    clip = find_parts(llava()).owner
    last = find_parts(family("llama4")).owner if "llama4" in installed_types() else None
    monkeypatch.setattr(inspect, "getsource", fail)
    tower = find_tower(clip)
    assert (tower.leading, tower.trailing) == (1, 0)
    if last is not None:
        with pytest.raises(
            ValueError, match=r"code of Llama4VisionModel can't be read, so where it puts its CLS token"
        ):
            find_tower(last)


def test_features_need_a_projector_of_single_tokens() -> None:
    tower = find_tower(find_parts(family("gemma3")).owner)
    assert tower.projector is None
    with pytest.raises(ValueError, match="no projector that maps"):
        check_needs(tower, frozenset({"features"}))
    with pytest.raises(ValueError, match="no projector"):
        TowerOutput().project(torch.zeros(1, 4))


def test_features_of_no_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="vision_feature_layer=0 takes its features from no layer"):
        find_tower(find_parts(llava(layer=0)).owner)


def test_other_features_than_the_watched_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="vision_feature_layer=-1: the vision tower is watched for -2"):
        look(llava(), {**tiny.prompt("llava"), "vision_feature_layer": -1})


def test_a_tower_that_did_not_run_is_refused() -> None:
    model = llava()
    inputs = tiny.prompt("llava")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="pass pixel_values with the prompt"):
        look(model, {**inputs, "inputs_embeds": embeds})


def test_a_tower_without_some_heads_is_refused() -> None:
    model = llava()
    find_parts(model).owner.vision_tower.config.num_attention_heads = 4
    with pytest.raises(ValueError, match="holds 2 of 4 attention heads"):
        look(model, tiny.prompt("llava"))


def test_an_interpolated_image_is_refused() -> None:
    model = tiny.build("llava_onevision")
    model.config.vision_aspect_ratio = "anyres_max_1"
    inputs = tiny.prompt("llava_onevision", images=((tiny.Image(48, 48),),), before=(3,), after=(4,))
    tokens = 36 + 6 * 7  # 12 x 12 patches become 6 x 6
    ids = inputs["input_ids"][:, : tokens + 6].clone()
    ids[:, 4 : 4 + tokens], ids[:, 4 + tokens :] = IMAGE, 7
    with pytest.raises(ValueError, match="interpolates between the vision tower's features"):
        look(model, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.parametrize(("name", "missing"), [("qwen2_vl", "image_grid_thw"), ("llava_next", "image_sizes")])
def test_missing_sizes_are_named(name: str, missing: str) -> None:
    model = grid_model(name) if name in GRID_MODELS else tiny.build(name)
    visual = torch.tensor([[False, True, True, True, True, False]])
    with pytest.raises(ValueError, match=f"was not given {missing}"):
        layout_of(find_parts(model).owner, {}, visual, *index_of(visual))


def test_an_average_of_features_is_none_of_them() -> None:
    """Not even where the average of their numbers is the number of another: that of 4 and 6 is not 5."""
    numbers = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, -1.0])
    squares = numbers.square() + torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert picture_of(torch.stack([numbers, squares], dim=-1), 2) is None
    picture = picture_of(torch.stack([numbers, numbers.square()], dim=-1), 2)
    assert picture is not None
    assert [grid.size for grid in picture.grids] == [(2, 2), (1, 1)]


def test_features_from_elsewhere_are_of_the_towers_size() -> None:
    """As in inputs_embeds: of CLIP, which has learned 6 x 6 positions; of a tower that has learned none nothing is known."""
    owner = find_parts(llava()).owner
    visual = torch.tensor([[0, *[1] * 36, 0, 0, *[1] * 72], [*[1] * 36, *[0] * 75]]).bool()
    layout = layout_of(owner, {}, visual, *index_of(visual))
    assert [(view.sample, int(view.rows[0]), view.grid, int(view.features[0])) for view in layout.views] == [
        (0, 1, (6, 6), 0),
        (0, 39, (6, 6), 36),
        (0, 75, (6, 6), 72),
        (1, 0, (6, 6), 108),
    ]
    with pytest.raises(
        ValueError, match="nothing tells how many rows and columns the visual tokens of Mistral3"
    ):
        layout_of(find_parts(family("mistral3")).owner, {}, visual, *index_of(visual))


@pytest.mark.parametrize("tokens", [4, 9, 16, 35, 37, 64, 144 + 1])
def test_a_square_of_another_size_is_no_grid(tokens: int) -> None:
    """Not the size that the tower's patches come to by the config: 4, 9, 16 and 64 tokens may stand in any way."""
    owner = find_parts(llava()).owner
    visual = torch.ones(1, tokens, dtype=torch.bool)
    for given in ({}, {"pixel_values": torch.ones(1, 3, 24, 24)}):
        with pytest.raises(
            ValueError, match=r"an? .*of 6 x 6 patches makes 6 x 6 by its config|each of 1 images"
        ) as error:
            layout_of(owner, given, visual, *index_of(visual))
        assert "pass visual_grid=[H, W]" in str(error.value)


def test_images_of_another_shape() -> None:
    owner = find_parts(llava()).owner
    visual = torch.ones(1, 16, dtype=torch.bool)
    (view,) = layout_of(owner, {"pixel_values": torch.ones(1, 3, 8, 32)}, visual, *index_of(visual)).views
    assert view.grid == (2, 8)
    # As many tokens as 4 images of this shape make, and there is one.
    with pytest.raises(
        ValueError, match="16 visual tokens, and each of 1 images of 1 x 4 patches makes 1 x 4"
    ):
        layout_of(owner, {"pixel_values": torch.ones(1, 3, 4, 16)}, visual, *index_of(visual))


@pytest.mark.parametrize("name", sorted({"idefics2", "aria", "granite4_vision"} & set(families.TYPES)))
def test_tokens_made_by_attention_stand_nowhere(name: str) -> None:
    """Latents of Idefics 2 and Aria: also where they are as many as there are patches, or as a square has."""
    if name == "granite4_vision" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers can't build it from its default config")
    owner = find_parts(family(name)).owner
    for tokens in (9, 36):
        visual = torch.ones(1, tokens, dtype=torch.bool)
        for sizes in ({}, {"image_sizes": torch.tensor([[24, 24]])}):
            given = {"pixel_values": torch.ones(1, 3, 24, 24), **sizes}
            with pytest.raises(ValueError, match=r"nothing tells how many rows .*: pass visual_grid"):
                layout_of(owner, given, visual, *index_of(visual))
        given = {"pixel_values": torch.ones(1, 3, 24, 24), "visual_grid": (1, tokens)}
        assert layout_of(owner, given, visual, *index_of(visual)).views[0].grid == (1, tokens)
    with pytest.raises(ValueError, match=r"of all patches, by attention|of several of the tower's features"):
        find_tower(owner)


@pytest.mark.parametrize("name", sorted({"step3p7", "granite_docling", "got_ocr2"} & set(families.TYPES)))
def test_strides_and_remainders_leave_the_grid_unknown(name: str) -> None:
    """Towers that merge patches by strided convolutions, and squares that the patches are not a multiple of."""
    owner = find_parts(family(name)).owner
    for tokens in (1, 4, 16, 36):
        visual = torch.ones(1, tokens, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"pass visual_grid"):
            layout_of(owner, {}, visual, *index_of(visual))


def test_patches_are_averaged_in_squares_only_where_the_config_says_so() -> None:
    """Four patches of a row side by side, as in MiniGPT-v2, are as many as 2 x 2 are."""
    model = llava()
    tower = find_tower(find_parts(model).owner)
    rows = torch.arange(64.0)[:, None]
    arguments = {"pixel_values": torch.ones(1, 3, 32, 32)}
    assert tower.to_features(rows, arguments, 16) is rows  # and is refused for its number
    model.config.downsample_factor = 2
    assert tower.to_features(rows, arguments, 16)[:2, 0].tolist() == [4.5, 6.5]


def test_the_model_and_the_caller_dont_both_say_grids() -> None:
    model = grid_model("qwen2_vl")
    inputs = grid_prompt(model)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    with pytest.raises(
        ValueError, match=r"visual_grid=\(2, 2\): Qwen2VLModel tells the grids of its images itself"
    ):
        layout_of(find_parts(model).owner, {**inputs, "visual_grid": (2, 2)}, visual, *index_of(visual))


def test_frames_that_a_model_pools_are_refused() -> None:
    owner = find_parts(tiny.build("llava_onevision")).owner
    visual = torch.ones(1, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="pixel_values_videos: nothing tells"):
        layout_of(owner, {"pixel_values_videos": torch.ones(1, 1, 3, 24, 24)}, visual, *index_of(visual))


@pytest.mark.parametrize(("drop", "match"), [("row", "don't add up to"), ("image", "belong to 3")])
def test_sizes_must_match_the_prompt(drop: str, match: str) -> None:
    model = grid_model("qwen2_vl")
    inputs = grid_prompt(model, ((("image", (1, 4, 4)),), (("image", (1, 4, 6)), ("image", (1, 6, 4)))))
    visual = inputs["input_ids"] == IMAGE
    if drop == "row":
        visual[1] &= visual[1].cumsum(0) < visual[1].sum()
    else:
        inputs["image_grid_thw"] = torch.tensor([(1, 4, 4), (1, 4, 6), (1, 6, 4), (1, 2, 2)])
    with pytest.raises(ValueError, match=match):
        layout_of(find_parts(model).owner, inputs, visual, *index_of(visual))


def test_images_and_videos_must_be_told_apart() -> None:
    model = grid_model("qwen2_vl")
    inputs = grid_prompt(model)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    given = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    with pytest.raises(ValueError, match="pass mm_token_type_ids or input_ids"):
        layout_of(find_parts(model).owner, given, visual, *index_of(visual))
