"""What is made once for prompts of one kind does not reach prompts of another."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import ways
from support.lone import lone
from support.tiny import IMAGE, Image, build, prompt
from support.towers import family
from torch import Tensor
from torch._subclasses import FakeTensorMode

import gap_triton
from gap_triton import GapConfig
from gap_triton.constants import Constants
from gap_triton.host import to_device
from gap_triton.integration.supported_models import find_parts
from gap_triton.latency import count
from gap_triton.vision.layout import layout_of
from gap_triton.vision_tower.sizes import HOST_SIZES, host_sizes

CPU = torch.device("cpu")
REGION = GapConfig(0.3, -1, "random", "region")


def of_grid(height: int, width: int, batch: str = "even") -> dict[str, Tensor]:
    """A prompt of the tiny Qwen2.5-VL with images of another shape and the same number of tokens."""
    inputs = ways.make(ways.MROPE, batch)
    inputs["image_grid_thw"] = torch.tensor([[1, height, width]] * len(inputs["image_grid_thw"]))
    return inputs


def tiled(*images: Image) -> dict[str, Tensor]:
    return prompt("llava_next", images=(images,), before=(3,), after=(4,))


def kept(model: torch.nn.Module, inputs: dict[str, Any]) -> list[int]:
    with torch.no_grad():
        model(**inputs)
    return gap_triton.last_selection(model).visual_index.tolist()


ALIKE: dict[str, tuple[str, list[Callable[[], dict[str, Tensor]]]]] = {
    "grids": (ways.MROPE, [lambda: of_grid(12, 12), lambda: of_grid(6, 24), lambda: of_grid(24, 6)]),
    "batches": (ways.MROPE, [lambda: of_grid(12, 12), lambda: of_grid(12, 12, "single-ends-in-image")]),
    "tiles": (
        "llava_next",
        [lambda: tiled(Image(24, 48), Image(48, 24)), lambda: tiled(Image(48, 24), Image(24, 48))],
    ),
    "images": (
        "llava",
        [
            functools.partial(ways.make, "llava", name)
            for name in ("left-padded", "ragged-images", "even", "single")
        ],
    ),
}


@pytest.mark.parametrize(
    "config",
    [
        REGION,
        GapConfig(0.3, -1, "received", "region", "aggregation"),
        GapConfig(0.3, 1, "text", "region"),
        GapConfig(0.3, -1, "key_norm", merge="nearest"),
    ],
    ids=["random", "tower", "decoder", "nearest"],
)
@pytest.mark.parametrize("name", ALIKE)
def test_prompts_by_turns(name: str, config: GapConfig) -> None:
    """One model that sees all of them, twice, and one for each."""
    kind, made = ALIKE[name]
    model = ways.build(kind, "gap_triton")
    gap_triton.configure(model, config)
    prompts = [make() for make in made]
    for _ in range(2):
        for inputs in prompts:
            fresh = ways.build(kind, "gap_triton")
            gap_triton.configure(fresh, config)
            assert kept(model, inputs) == kept(fresh, inputs)


@pytest.mark.parametrize("order", [1, -1])
def test_images_and_videos_in_another_order(order: int) -> None:
    """As many tokens of both kinds, of one size: only their ids tell which feature belongs where."""
    owner = find_parts(ways.build(ways.MROPE)).owner
    kept_values = Constants(8)
    for videos_first in (False, True)[::order]:
        video = torch.arange(72) < 36 if videos_first else torch.arange(72) >= 36
        given = {
            "mm_token_type_ids": 1 + video.int()[None],
            "image_grid_thw": torch.tensor([[1, 12, 12]]),
            "video_grid_thw": torch.tensor([[1, 12, 12]]),
        }
        visual = torch.ones(1, 72, dtype=torch.bool)
        views = layout_of(owner, given, visual, torch.arange(72)[None], [72], layouts=kept_values).views
        assert [int(view.features[0]) for view in views] == [36 * videos_first, 36 * (not videos_first)]
    assert len(kept_values) == 2


def test_a_grid_that_the_caller_names_is_not_kept_for_another() -> None:
    model = lone()
    gap_triton.attach(model, REGION)
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[:, 2:34] = True
    inputs = {"inputs_embeds": torch.randn(1, 40, 64), "visual_mask": mask}
    grids: list[object] = [[4, 8], [[4, 8]], [8, 4], [[2, 8], [2, 8]], np.array([4, 8])]
    found = [kept(model, {**inputs, "visual_grid": grid}) for grid in grids]
    assert found[0] == found[1] == found[4]
    assert found[2] != found[0] != found[3]


def test_a_configuration_forgets() -> None:
    """The tower, or the config of the model, may be another by then."""
    model = ways.build("llava", "gap_triton")
    gap_triton.configure(model, REGION)
    kept(model, ways.make("llava", "single"))
    attachment = model.model._gap_attachment
    assert len(attachment.layouts) == 1
    assert len(copy.deepcopy(model).model._gap_attachment.layouts) == 0
    assert len(pickle.loads(pickle.dumps(attachment.layouts))) == 0
    gap_triton.configure(model, REGION)
    assert len(attachment.layouts) == 0


def test_a_prompt_of_no_whole_grid_is_refused_at_any_time() -> None:
    """Also where as many tokens have been seen before."""
    model = build("llava", "gap_triton")
    gap_triton.configure(model, REGION)
    inputs = ways.make("llava", "single")
    for _ in range(2):
        kept(model, inputs)
        mask = (inputs["input_ids"] == IMAGE) & ((inputs["input_ids"] == IMAGE).cumsum(1) > 6)
        with pytest.raises(ValueError, match="66 visual tokens"):
            kept(model, {**inputs, "visual_mask": mask})


# --------------------------------------------------------------------------------------------- sizes
def test_sizes_are_read_once() -> None:
    given = {
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "video_grid_thw": torch.tensor([[2, 4, 4], [1, 2, 2]]),
        "pixel_values": torch.zeros(1),
        "image_sizes": None,
    }
    expected = {"image_grid_thw": ((1, 4, 6),), "video_grid_thw": ((2, 4, 4), (1, 2, 2))}
    counts = count(lambda: host_sizes(given), CPU)
    assert (counts.reads, counts.copies) == (1, 0)
    found = host_sizes(given)
    assert {name: found[name] for name in expected} == expected
    assert found["pixel_values"] is given["pixel_values"]
    assert count(lambda: host_sizes(found), CPU).reads == 0  # they are tuples by now
    assert count(lambda: host_sizes({**given, HOST_SIZES: expected}), CPU).reads == 0
    assert host_sizes({"image_sizes": [[24, 48]]})["image_sizes"] == ((24, 48),)
    assert host_sizes({"image_sizes": np.array([[24, 48]])})["image_sizes"] == ((24, 48),)


def test_rows_are_read_for_the_first_prompt_alone() -> None:
    owner, kept_values = find_parts(family("llava")).owner, Constants(4)
    visual = torch.ones(1, 36, dtype=torch.bool)
    given = {"pixel_values": torch.zeros(1, 3, 24, 24)}

    def run() -> None:
        layout_of(owner, given, visual, torch.arange(36)[None], [36], layouts=kept_values)

    assert count(run, CPU).reads > 0
    assert count(run, CPU).reads == 0


# --------------------------------------------------------------------------------------------- constants
def test_a_memo_is_bounded_and_forgets_what_is_used_least() -> None:
    kept_values, made = Constants(2), []

    def get(key: int) -> Tensor:
        return kept_values.get(key, CPU, lambda: made.append(key) or torch.tensor(key))

    for key in (0, 1, 0, 2, 0, 1):
        assert int(get(key)) == key
    assert made == [0, 1, 2, 1]
    assert len(kept_values) == 2


def test_a_memo_keeps_nothing_fake_and_gives_nothing_real_to_what_is_traced() -> None:
    kept_values = Constants(2)
    with FakeTensorMode():
        kept_values.get("key", CPU, lambda: torch.zeros(2))
    assert len(kept_values) == 0
    real = kept_values.get("key", CPU, lambda: torch.zeros(2))
    with FakeTensorMode():
        assert type(kept_values.get("key", CPU, lambda: torch.zeros(2))) is not Tensor
    with torch.inference_mode():
        assert kept_values.get("key", CPU, lambda: torch.zeros(2)) is real
        assert not kept_values.get("other", CPU, lambda: torch.zeros(2)).is_inference()


def test_what_fails_is_not_kept() -> None:
    kept_values = Constants(2)
    with pytest.raises(ZeroDivisionError):
        kept_values.get("key", CPU, lambda: 1 // 0)
    assert kept_values.get("key", CPU, lambda: 1) == 1


def test_ints_on_a_device() -> None:
    assert to_device([3, 1], CPU).tolist() == [3, 1]
    counts = count(lambda: to_device([3, 1], CPU), CPU)
    assert (counts.reads, counts.copies) == (0, 0)


@pytest.mark.parametrize("merge", ["none", "aggregation"])
def test_tiles_share_a_budget_equally_and_newlines_stay_besides(merge: str) -> None:
    """Nüwa on LLaVA-NeXT: so many of the overview, as many for each tile of the details, and every newline."""
    model = ways.build("llava_next", "gap_triton")
    inputs = prompt("llava_next", images=((Image(48, 48),), (Image(24, 40),)), before=(3, 3), after=(4, 4))
    score = "random" if merge == "none" else "received"
    gap_triton.configure(model, GapConfig(17, -1, score, "region", merge, per_region=3, budget_by="tiles"))
    with torch.no_grad():
        model(**inputs)
    selection = gap_triton.last_selection(model)
    owner = find_parts(model).owner
    rows = selection.candidates
    counts = (rows >= 0).sum(1).tolist()
    layout = layout_of(owner, inputs, inputs["input_ids"] == IMAGE, rows, counts, layouts=Constants(4))
    kept = [set(row[row >= 0].tolist()) for row in selection.visual_index]
    found: dict[int, list[int]] = {0: [], 1: []}
    in_grids: dict[int, set[int]] = {0: set(), 1: set()}
    for view in layout.views:
        tokens = set(rows[view.sample][torch.from_numpy(view.numbers)].tolist())
        found[view.sample].append(len(tokens & kept[view.sample]))
        in_grids[view.sample] |= tokens
    # Five tiles share 17, and three share 17.
    assert found == {0: [3, 4 * 3], 1: [5, 2 * 5]}
    for sample, numbers in enumerate(rows):
        newlines = set(numbers[numbers >= 0].tolist()) - in_grids[sample]
        assert newlines
        assert newlines <= kept[sample]


def test_every_tile_keeps_at_least_one_token() -> None:
    model = ways.build("llava_next", "gap_triton")
    inputs = prompt("llava_next", images=((Image(48, 48),),), before=(3,), after=(4,))
    kept = {}
    for keep in (2, 5):
        gap_triton.configure(model, GapConfig(keep, -1, "random", budget_by="tiles"))
        with torch.no_grad():
            model(**inputs)
        kept[keep] = gap_triton.last_selection(model).visual_index.tolist()
    assert kept[2] == kept[5]  # one of each of the five
