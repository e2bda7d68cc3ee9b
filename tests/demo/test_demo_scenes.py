"""The scene generator: reproducible, split by seed, and every box exact."""

from pathlib import Path

import pytest
import torch

from gap_triton.demo import scenes
from gap_triton.demo.scenes import (
    GAP,
    HELD_OUT_SEED,
    IMAGE_SIZE,
    LARGEST,
    MOST_OBJECTS,
    NOISE,
    PATCH,
    RGB,
    SMALLEST,
)

FIELDS = ("images", "colours", "shapes", "boxes", "present", "target", "owners")


def equal(first: scenes.Scenes, second: scenes.Scenes) -> bool:
    return all(torch.equal(getattr(first, field), getattr(second, field)) for field in FIELDS)


@pytest.fixture(scope="module")
def batch() -> scenes.Scenes:
    return scenes.draw(300, seed=7)


def test_same_seed_gives_same_scenes(batch: scenes.Scenes) -> None:
    assert equal(batch, scenes.draw(300, seed=7))
    assert not torch.equal(batch.boxes, scenes.draw(300, seed=8).boxes)


def test_held_out_is_deterministic_and_a_prefix_of_more() -> None:
    assert equal(scenes.held_out(70), scenes.held_out(130)[:70])


def test_held_out_seeds_are_beyond_every_training_seed() -> None:
    from training.train import SEEDS_PER_RUN

    largest_run_seed = HELD_OUT_SEED // SEEDS_PER_RUN - 1
    assert (largest_run_seed + 1) * SEEDS_PER_RUN - 1 < HELD_OUT_SEED
    assert equal(scenes.held_out(5), scenes.draw(64, seed=HELD_OUT_SEED)[:5])


def test_splits_have_no_seed_in_common_and_none_of_training() -> None:
    seeds = [scenes.seeds_of(2048, split) for split in scenes.SPLITS]
    assert sorted(len(set(each)) for each in seeds) == [32] * 4
    assert len({seed for each in seeds for seed in each}) == 4 * 32
    assert min(min(each) for each in seeds) == HELD_OUT_SEED
    assert max(scenes.SPLITS.values()) + 2**28 == scenes.LARGEST_SEED + 1
    for split, first in scenes.SPLITS.items():
        assert equal(scenes.held_out(3, split), scenes.draw(64, seed=first)[:3])
    assert equal(scenes.held_out(3), scenes.held_out(3, "development"))
    most = 2**28 * 64
    assert scenes.seeds_of(most, "sealed").stop == scenes.LARGEST_SEED + 1
    for split in scenes.SPLITS:
        with pytest.raises(ValueError, match=f"count is {most + 1}; it must be .* at most {most}"):
            scenes.seeds_of(most + 1, split)
    with pytest.raises(ValueError, match="split is 'test'; it must be one of 'development', 'choice'"):
        scenes.held_out(1, "test")


def test_nothing_uses_the_sealed_split() -> None:
    root = Path(scenes.__file__).resolve().parents[2]
    for path in (*root.glob("gap_triton/**/*.py"), *root.glob("docs/**/*.json"), *root.glob("training/*.py")):
        if path.name not in ("scenes.py", "choices.py"):
            assert '"sealed"' not in path.read_text(encoding="utf-8"), path


def test_held_out_scenes_occur_in_no_training_batch() -> None:
    def layouts(part: scenes.Scenes) -> set[tuple[int, ...]]:
        return {
            tuple(row) for row in torch.cat([part.boxes.flatten(1), part.colours, part.shapes], 1).tolist()
        }

    seen = set().union(*(layouts(scenes.draw(64, seed=seed)) for seed in range(20)))
    assert len(seen) == 20 * 64
    assert not seen & layouts(scenes.held_out(256))


def test_boxes_are_the_bounding_boxes_of_the_painted_pixels(batch: scenes.Scenes) -> None:
    rgb = torch.tensor(RGB, dtype=torch.uint8)
    assert rgb.amax(1).min() >= NOISE  # an object's pixel can't be mistaken for background
    for row in range(len(batch)):
        painted = torch.zeros(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
        for slot in batch.present[row].nonzero()[:, 0].tolist():
            x0, y0, x1, y1 = batch.boxes[row, slot].tolist()
            colour = rgb[batch.colours[row, slot]][:, None, None]
            inside = (batch.images[row, :, y0:y1, x0:x1] == colour).all(0)
            # The object touches all four sides of its box ...
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            painted[y0:y1, x0:x1] |= inside
        # ... and outside the objects there is background only.
        assert batch.images[row][:, ~painted].max() < NOISE


def test_objects_have_the_documented_sizes_and_keep_apart(batch: scenes.Scenes) -> None:
    sides = (batch.boxes[..., 2:] - batch.boxes[..., :2])[batch.present]
    assert sides.min() >= SMALLEST
    assert sides.max() <= LARGEST
    assert batch.boxes.min() >= 0
    assert batch.boxes.max() <= IMAGE_SIZE
    for first in range(MOST_OBJECTS):
        for second in range(first):
            both = batch.present[:, first] & batch.present[:, second]
            a, b = batch.boxes[both, first], batch.boxes[both, second]
            distance = torch.maximum(a[:, :2] - b[:, 2:], b[:, :2] - a[:, 2:]).amax(1)
            assert distance.min() >= GAP


def test_owners_name_the_object_at_each_patch_centre(batch: scenes.Scenes) -> None:
    centres = batch.images[:, :, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    assert (centres.amax(1)[batch.owners == MOST_OBJECTS] < NOISE).all()
    for slot in range(MOST_OBJECTS):
        mine = batch.owners == slot
        assert mine.flatten(1).any(1)[batch.present[:, slot]].all()
        colours = torch.tensor(RGB, dtype=torch.uint8)[batch.colours[:, slot]][:, :, None, None]
        assert (centres == colours).all(1)[mine].all()


@pytest.mark.parametrize(("shape", "share"), [("circle", 0.785), ("square", 1.0), ("triangle", 0.5)])
def test_shapes_fill_the_share_of_their_box_that_geometry_says(
    batch: scenes.Scenes, shape: str, share: float
) -> None:
    here = batch.present[:, 0] & (batch.shapes[:, 0] == scenes.SHAPES.index(shape))
    for row in here.nonzero()[:20, 0].tolist():
        x0, y0, x1, y1 = batch.boxes[row, 0].tolist()
        inside = batch.images[row, :, y0:y1, x0:x1].amax(0) >= NOISE
        # The tip of a triangle is one row wider than geometry has it: up to 1 / side more.
        assert inside.float().mean().item() == pytest.approx(share, abs=0.07)


def test_an_expression_names_exactly_one_object(batch: scenes.Scenes) -> None:
    for row in range(len(batch)):
        names = [batch.name(row, slot) for slot in batch.present[row].nonzero()[:, 0].tolist()]
        assert len(set(names)) == len(names)
        assert names.count(batch.name(row)) == 1
        assert batch.question(row) == f"where is the {batch.name(row)}?"


def test_distractors_often_share_colour_or_shape_with_the_target(batch: scenes.Scenes) -> None:
    rows = torch.arange(len(batch))
    others = batch.present.clone()
    others[rows, batch.target] = False
    same_colour = batch.colours == batch.colours[rows, batch.target][:, None]
    same_shape = batch.shapes == batch.shapes[rows, batch.target][:, None]
    assert ((same_colour | same_shape) & others).any(1).float().mean() > 0.5


def test_object_counts_follow_the_request() -> None:
    assert scenes.draw(50, 1, fewest=1, most=1).present.sum(1).eq(1).all()
    counts = scenes.draw(300, 1).present.sum(1)
    assert set(counts.tolist()) == {2, 3, 4}


def test_image_shows_the_scene_at_native_size(batch: scenes.Scenes) -> None:
    image = batch.image(3)
    assert image.mode == "RGB"
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    x0, y0, x1, y1 = batch.target_boxes[3].tolist()
    centre = ((x0 + x1) // 2, (y0 + y1) // 2)
    assert image.getpixel(centre) == RGB[int(batch.colours[3, batch.target[3]])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0, "seed": 0}, r"count is 0; .* at least 1"),
        ({"count": 1, "seed": -1}, r"seed is -1; .* 0\.\.4294967295"),
        ({"count": 1, "seed": 2**32}, r"seed is 4294967296; "),
        ({"count": 1, "seed": 0, "fewest": 3, "most": 2}, r"fewest, most are 3, 2; "),
        ({"count": 1, "seed": 0, "most": 5}, r"fewest, most are 2, 5; .* <= 4"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes.draw(**arguments)


def test_bad_held_out_count_is_named() -> None:
    with pytest.raises(ValueError, match=r"count is 0; .* at least 1"):
        scenes.held_out(0)
