"""What a vision tower tells of the visual tokens, against an eager run of it; where they stand, against marked pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import families
import pytest
import tiny
import torch
import transformers
from tiny import BOS, IMAGE, IMAGE_SIZE, PAD, PATCH, VIDEO
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gap_triton.models import find_parts
from gap_triton.prompt import find_visual_tokens
from gap_triton.vision.layout import Layout, layout_of
from gap_triton.vision.tower import TowerOutput, TowerWatch, check_needs, find_tower, install

ALL = frozenset({"received", "key_norm", "keys", "similarity"})
OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "proj", "projection_layer")  # of the attention of vision towers
CLIP = {**tiny.VISION, "num_hidden_layers": 7}


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


@contextlib.contextmanager
def watched(model: PreTrainedModel, needs: frozenset[str]) -> Iterator[list[Seen]]:
    """Everything that prompts of ``model`` show inside the block, one entry each."""
    owner, text = find_parts(model)
    tower = find_tower(owner)
    check_needs(tower, needs)
    seen: list[Seen] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        visual = find_visual_tokens(owner, ids, kwargs.get("inputs_embeds"))
        if visual is None:
            return
        watch = TowerWatch(tower, needs)
        watch.start(kwargs)
        seen.append(Seen(visual=visual))

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given=kwargs) -> None:
            handle.remove()
            watch.stop()
            seen[-1].door = kwargs["inputs_embeds"]
            seen[-1].output = watch.output()
            seen[-1].layout = layout_of(owner, {"input_ids": ids, **given}, visual, *index_of(visual))

        handle = text.register_forward_pre_hook(enter, with_kwargs=True)

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


@contextlib.contextmanager
def captured(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Outputs of ``modules``, in the order of the calls."""
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


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


def test_projected_features_are_what_enters_the_decoder() -> None:
    seen = look(llava(), tiny.prompt("llava", images=THREE), frozenset({"features"}))
    for view in seen.layout.views:
        projected = seen.output.project(seen.output.features[view.features])
        torch.testing.assert_close(projected, seen.door[view.sample, view.rows])


# --------------------------------------------------------------------------------------------- layouts
def without_mixing(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with a vision tower whose attention adds nothing, so that a patch reaches no row but its own."""
    tower = find_tower(find_parts(model).owner)
    for module in tower.layers.modules():
        for name, child in module.named_children():
            if name in OUTPUT_PROJECTIONS and isinstance(child, nn.Linear):
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
TILED = {(24, 48): ((1, 2), (0, 0)), (48, 48): ((2, 2), (0, 0)), (24, 40): ((1, 2), (0, 1)), (40, 24): ((2, 1), (1, 0))}


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
Picture = tuple[str, tuple[int, int, int]]  # what it is; its frames, rows and columns of patches
PICTURES: tuple[tuple[Picture, ...], ...] = (
    (("image", (1, 6, 8)),),
    (("image", (1, 4, 10)), ("video", (2, 4, 6)), ("image", (1, 10, 6))),
)
MERGE = 2


def grid_model(name: str) -> PreTrainedModel:
    config = families.config_of(name)
    if hasattr(config.vision_config, "fullatt_block_indexes"):
        config.vision_config.depth = 3
        config.vision_config.fullatt_block_indexes = [1]
        config.vision_config.window_size = 2 * MERGE * PATCH  # two merged tokens
    kind = getattr(transformers, families.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    return tiny.seed_weights(kind._from_config(config, attn_implementation="sdpa"))


def grid_prompt(
    model: PreTrainedModel, samples: tuple[tuple[Picture, ...], ...] = PICTURES
) -> dict[str, Tensor]:
    """Prompts with pictures of given grids, and random pixels for them, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    config = model.config
    apart = "qwen3" in config.model_type  # a frame of a video is one picture among the tokens
    start, end = config.vision_start_token_id, config.vision_end_token_id
    rows, pixels, grids = [], {"image": [], "video": []}, {"image": [], "video": []}
    for pictures in samples:
        row = [BOS, 7, 8]
        for kind, (frames, height, width) in pictures:
            tokens = [IMAGE if kind == "image" else VIDEO] * (height * width // MERGE**2)
            for _ in range(frames if apart else 1):
                row += [9, start, *tokens * (1 if apart else frames), end]
            pixels[kind].append(torch.randn(frames * height * width, 3 * 2 * PATCH**2, generator=generator))
            grids[kind].append((frames, height, width))
        rows.append([*row, 10, 11])
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), **families._companions(model, ids)}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if pixels[kind]:
            inputs[f"pixel_values{suffix}"] = torch.cat(pixels[kind])
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
        else:
            inputs.pop(f"{kind}_grid_thw", None)
    return inputs


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


GRID_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


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


@dataclass
class Eager:
    """An attention function that writes its weights down."""

    module: nn.Module
    weights: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        weights = (query @ key.transpose(-1, -2) * scaling).softmax(dim=-1)
        if module is self.module:
            self.weights.append(weights[0])  # [H, S, S]
            self.keys.append(key[0].transpose(0, 1).flatten(1))  # [S, H * D]
        return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("name", GRID_MODELS)
def test_a_merging_tower_tells_what_an_eager_one_shows(name: str) -> None:
    model = grid_model(name)
    inputs = grid_prompt(model)
    tower = find_parts(model).owner.visual
    output = look(model, inputs).output

    expected: dict[str, list[Tensor]] = {need: [] for need in ALL}
    eager = Eager(tower.blocks[1 if name == "qwen2_5_vl" else -1].attn)
    AttentionInterface.register("written_down", eager)
    tower.set_attn_implementation("written_down")
    for kind, suffix in (("image", ""), ("video", "_videos")):
        eager.weights, eager.keys = [], []
        pixels, grid = inputs[f"pixel_values{suffix}"], inputs[f"{kind}_grid_thw"]
        with captured([*tower.blocks, tower.merger]) as outputs, torch.no_grad():
            run = tower(pixels, grid_thw=grid)
        *blocks, merged = outputs
        states = blocks[len(blocks) - 1 - len(blocks) // 3 :]
        patches = {
            "received": torch.cat([weights.mean(dim=(0, 1)) for weights in eager.weights]),
            "keys": torch.cat(eager.keys),
            "key_norm": torch.cat(eager.keys).norm(dim=-1),
            "similarity": torch.stack(states).mean(dim=0),
        }
        final = getattr(run, "pooler_output", run)
        final = final[0] if isinstance(final, tuple) else final  # transformers 4: with deepstack features behind
        # The tower puts what its merger made back into raster order.
        order = torch.cdist(final.double(), merged.double()).argmin(dim=1)
        assert (name == "qwen2_5_vl") == (not torch.equal(order, torch.arange(len(order))))
        for need, rows in patches.items():
            expected[need].append(rows.unflatten(0, (-1, MERGE**2)).mean(dim=1)[order])
    for need, parts in expected.items():
        torch.testing.assert_close(getattr(output, need), torch.cat(parts), rtol=1e-4, atol=1e-5)
