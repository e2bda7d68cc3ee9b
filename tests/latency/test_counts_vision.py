"""What choosing tokens before the decoder asks of a device: reads, copies that the host waits for, and launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from support import ways
from support.methods import preset
from support.tiny import Image as Sized
from support.tiny import build, prompt
from transformers import AutoModelForImageTextToText, PreTrainedModel

import gap_triton
from gap_triton import GapConfig
from gap_triton.demo.architectures import ARCHITECTURES, find
from gap_triton.demo.scenes import IMAGE_SIZE
from gap_triton.integration import decoder_run, hooks
from gap_triton.latency import count
from gap_triton.latency.counting import Counts
from gap_triton.latency.variants import share
from gap_triton.presets import PRESETS
from gap_triton.vision.select import select_before_decoder
from gap_triton.vision_tower.sizes import HOST_SIZES

CPU = torch.device("cpu")
MODELS = tuple(ARCHITECTURES)
# At most so many launches: of choosing and merging; and added to the vision encoder, the operator that scores among them.
LIMITS = {
    "random": (0, 0),
    "spatial": (0, 0),
    "cls": (0, 1),
    "text": (1, 0),
    "trim": (10, 0),
    "prumerge": (7, 1),
    "prumerge+": (9, 1),
    "visionzip": (10, 1),
    "nuwa": (7, 3),
    "divprune": (3, 0),
    "cdpruner": (13, 0),
    "scope": (7, 1),
    "fastervlm": (0, 1),
    "vispruner": (4, 1),
    "hiprune": (4, 2),
    "vscan": (5, 2),
}
# These record nothing of a vision encoder, and all but one don't ask where tokens stand.
UNRECORDED = ("random", "spatial", "text", "trim", "divprune", "cdpruner")
NO_GRID = tuple(name for name in UNRECORDED if name != "spatial")
# More launches for each thing recorded of a vision encoder with windows: means of patches, and their order.
MERGED_PATCHES = 2


@functools.cache
def embedded(name: str) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(find(name).folder, attn_implementation="sdpa").eval()


@functools.cache
def inputs_of(name: str, batch: int = 1) -> dict[str, torch.Tensor]:
    architecture = find(name)
    image = Image.effect_noise((IMAGE_SIZE, IMAGE_SIZE), 64).convert("RGB")
    text = f"{architecture.image_text} where is the red circle ?"
    processor = architecture.load_processor(architecture.folder)
    return dict(processor(images=[image] * batch, text=[text] * batch, return_tensors="pt"))


def attached(name: str, config: GapConfig) -> PreTrainedModel:
    model = share(embedded(name))
    gap_triton.attach(model, config)
    return model


def run(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**inputs)


@pytest.fixture
def selecting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counts]:
    """Counts what choosing asks for, in the last of some forwards."""
    found: list[Counts] = []

    def counted(*args: Any) -> Any:
        result: list[Any] = []
        found.append(count(lambda: result.append(select_before_decoder(*args)), CPU))
        return result[0]

    monkeypatch.setattr(decoder_run, "select_before_decoder", counted)

    def count_last(model: PreTrainedModel, *prompts: dict[str, Any]) -> Counts:
        for inputs in prompts:
            run(model, inputs)
        return found[-1]

    return count_last


def config_of(name: str, model: str) -> GapConfig:
    return preset(name, embedded(model).config.get_text_config().num_hidden_layers, cls=model == "llava")


def test_every_preset_before_the_decoder_has_a_limit() -> None:
    assert set(LIMITS) == {name for name in PRESETS if config_of(name, "llava").layer == -1}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("model", MODELS)
def test_choosing_reads_nothing_and_waits_for_no_copy(
    model: str, name: str, batch: int, selecting: Callable[..., Counts]
) -> None:
    """Of a prompt of a kind that was seen before: the sizes of images have been read with what the prompt holds."""
    inputs = inputs_of(model, batch)
    counts = selecting(attached(model, config_of(name, model)), inputs, inputs, inputs)
    assert (counts.reads, counts.copies) == (0, 0)
    if batch == 1:
        assert counts.launches <= LIMITS[name][0], counts.operators


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("model", MODELS)
def test_recording_the_vision_encoder(model: str, name: str) -> None:
    """One read at most, of sizes that windows and grids have in common."""
    inputs = inputs_of(model)

    def encode(encoder: PreTrainedModel) -> Callable[[], object]:
        names = ("pixel_values", "image_grid_thw")
        given = {key: inputs[key] for key in names if key in inputs}
        encoder.model.get_image_features(**given)
        return lambda: encoder.model.get_image_features(**given)

    with torch.no_grad():
        plain = count(encode(share(embedded(model))), CPU)
        counts = count(encode(attached(model, config_of(name, model))), CPU)
    recorded = model != "llava" and name not in UNRECORDED
    assert counts.reads - plain.reads == int(recorded)
    assert counts.copies == plain.copies
    things = recorded + (name in ("prumerge", "prumerge+", "visionzip", "nuwa", "hiprune", "vscan"))
    limit = LIMITS[name][1] + recorded * things * MERGED_PATCHES
    assert counts.launches - plain.launches <= limit, counts.operators


@pytest.mark.parametrize("name", ["cls", "visionzip", "nuwa", "spatial"])
def test_no_read_where_the_host_knows_the_sizes(
    name: str, selecting: Callable[..., Counts], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of("qwen2_5_vl")
    model = attached("qwen2_5_vl", config_of(name, "qwen2_5_vl"))
    sizes = {"image_grid_thw": inputs["image_grid_thw"].tolist()}

    def told(state: Any) -> None:
        state.owner.kwargs[HOST_SIZES] = sizes

    run(model, inputs)
    together = count(lambda: run(model, inputs), CPU)
    monkeypatch.setattr(hooks, "read_ahead", lambda state: None)
    apart = count(lambda: run(model, inputs), CPU)
    monkeypatch.setattr(hooks, "read_ahead", told)
    known = count(lambda: run(model, inputs), CPU)
    assert known.reads == together.reads == apart.reads - 1
    assert selecting(model, inputs).reads == 0


@pytest.mark.parametrize("name", ["prumerge", "trim"])
@pytest.mark.parametrize("model", MODELS)
def test_adaptive_numbers_are_read_once(model: str, name: str, selecting: Callable[..., Counts]) -> None:
    inputs = inputs_of(model, 3)
    cls = model == "llava"
    counts = selecting(attached(model, preset(name, 6, cls, "outliers")), inputs, inputs, inputs)
    assert (counts.reads, counts.copies) == (1, 0)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("batch", ["ragged-images", "left-padded"])
def test_batches_of_different_prompts(batch: str, name: str, selecting: Callable[..., Counts]) -> None:
    model, inputs = ways.build("llava", "gap_triton"), ways.make("llava", batch)
    gap_triton.configure(model, preset(name, 4, cls=True))
    counts = selecting(model, inputs, inputs)
    assert (counts.reads, counts.copies) == (0, 0)


@pytest.mark.parametrize("name", LIMITS)
def test_tiles_and_newlines(name: str, selecting: Callable[..., Counts]) -> None:
    model = build("llava_next", "gap_triton")
    images = ((Sized(24, 48),), (Sized(48, 48), Sized(24, 24)))
    inputs = prompt("llava_next", images=images, before=(3, 7), after=(5, 9))
    gap_triton.configure(model, preset(name, 4, cls=True))
    counts = selecting(model, inputs, inputs)
    assert (counts.reads, counts.copies) == (0, 0)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("model", MODELS)
def test_a_new_kind_of_prompt_costs_little(model: str, name: str, selecting: Callable[..., Counts]) -> None:
    """Other numbers of tokens than ever before: the rows are read once, to see that images are where they should be."""
    attached_model = attached(model, config_of(name, model))
    run(attached_model, inputs_of(model))
    counts = selecting(attached_model, inputs_of(model, 2))
    assert counts.copies == 0
