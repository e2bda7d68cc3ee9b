"""Every method equals its oracle: the same kept features at the same positions, everything else masked where it is gone."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
import transformers
from support import ways
from support.comparison import TOLERANCE, error
from support.embeds import embeds_of_prompt
from support.methods import NAMES, SHARE, method, preset
from support.prompts import BATCHES, make_prompt
from support.stages import compare, stages_of
from support.tiny import IMAGE, IMAGE_SIZE, LAYERS, VIDEO, Image, build, generate, prompt

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.presets import PRESETS


@pytest.mark.parametrize("batch", ["left-padded", "ragged-images"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ways.MODELS)
def test_methods(model: str, name: str, batch: str) -> None:
    config = method(name, LAYERS, cls=model == "llava")
    inputs = ways.make(model, batch)
    stages = compare(model, inputs, config)
    # As many as each stage says, and the ids that the model gives without pruning.
    visual = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    left = visual
    for stage, selection in zip(config.stages, stages, strict=True):
        kept = (selection.visual_index >= 0).sum(1).tolist()
        left = list(map(stage.count, visual, left))
        assert kept == left


@pytest.mark.parametrize("seed", range(6))
def test_a_later_image_may_be_dropped_whole(seed: int) -> None:
    """Then the text between the images is behind the last visual token that a later stage finds."""
    config = GapConfig(1, -1, "random", seed=seed, then=(Stage(1, 1, "last_token"),))
    inputs = ways.make("llava", "ragged-images")
    (first, _) = compare("llava", inputs, config)
    assert first.visual_index.shape[1] == 1


@pytest.mark.parametrize("batch", [b for b in BATCHES if b not in ("left-padded", "ragged-images")])
@pytest.mark.parametrize("name", ["nuwa", "pyramiddrop", "sparsevlm", "visionzip", "feather", "trim"])
@pytest.mark.parametrize("model", ways.MODELS)
def test_batches(model: str, name: str, batch: str) -> None:
    compare(model, ways.make(model, batch), method(name, LAYERS, cls=model == "llava"))


@pytest.mark.parametrize("name", ["prumerge", "trim"])
@pytest.mark.parametrize("model", ways.MODELS)
def test_outliers(model: str, name: str) -> None:
    compare(model, ways.make(model, "ragged-images"), preset(name, LAYERS, model == "llava", "outliers"))


@pytest.mark.parametrize("model", ways.MODELS)
@pytest.mark.parametrize(
    "name", [name for name in PRESETS if name != "nuwa"]
)  # whose second stage always drops
def test_keep_everything_is_sdpa_bit_for_bit(name: str, model: str) -> None:
    inputs = ways.make(model, "left-padded")
    dense = generate(ways.build(model, "sdpa"), inputs)
    pruned_model = ways.build(model, "gap_triton")
    gap_triton.configure(pruned_model, preset(name, LAYERS, model == "llava", budget=1.0))
    pruned = generate(pruned_model, inputs)
    assert torch.equal(pruned.sequences, dense.sequences)
    assert error(pruned, dense) == 0.0


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_where_tokens_merge(factor: float) -> None:
    """Before the projector; as the decoder gets them if the model does something to its output, as PaliGemma does."""
    model = ways.build("llava", "gap_triton")
    if factor != 1.0:
        encode = model.model.get_image_features

        def scaled(*args, **kwargs):
            output = encode(*args, **kwargs)
            if isinstance(output, (list, tuple)):
                return [features * factor for features in output]
            output.pooler_output = [features * factor for features in output.pooler_output]
            return output

        model.model.get_image_features = scaled
    inputs = ways.make("llava", "even")
    embeds: list[torch.Tensor] = []
    embeds_of_prompt(model, embeds)
    with torch.no_grad():
        gap_triton.configure(model, GapConfig(1.0, 1))
        model(**inputs)
        gap_triton.configure(model, GapConfig(9, -1, "cls", merge="average"))
        seen: list[torch.Tensor] = []
        embeds_of_prompt(model, seen)
        model(**inputs)
        gap_triton.configure(model, GapConfig(9, -1, "cls", merge="contextual"))
        model(**inputs)
    whole, average, contextual = embeds[0], seen[0], seen[1]
    selection = gap_triton.last_selection(model)
    assert selection.visual_index.shape[1] == 9
    # The mean of all that is dropped is made of what the decoder gets.
    for b in range(2):
        changed = (whole[b] != average[b]).any(-1).nonzero()[:, 0].tolist()
        assert len(changed) == 1
        # One contextual token of nine; its features went through the projector if that is where tokens merge.
        (row,) = (whole[b] != contextual[b]).any(-1).nonzero()[:, 0].tolist()
        assert row in selection.visual_index[b].tolist()
        visual = (inputs["input_ids"][b] == IMAGE).nonzero()[:, 0].tolist()
        others = [r for r in visual if r not in selection.visual_index[b].tolist()]
        behind = whole[b, row] + whole[b, others].mean(0)
        assert torch.allclose(contextual[b, row], behind, atol=1e-5) == (factor != 1.0)


BAD = [float("nan"), float("inf")]


def spoilt(inputs: dict[str, torch.Tensor], image: int, value: float) -> dict[str, torch.Tensor]:
    """``inputs`` with one bad pixel in an image."""
    pixels = inputs["pixel_values"].clone()
    images = pixels.view(int((inputs["input_ids"] == IMAGE).sum()) // 36, -1)
    images[image, 5] = value
    return {**inputs, "pixel_values": pixels}


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("name", [*NAMES, "outliers"])
@pytest.mark.parametrize("model", ways.MODELS)
def test_a_bad_pixel_stays_in_its_sample(model: str, name: str, image: int) -> None:
    """What the other samples keep, their ids and their logits are bit for bit what they are without it."""
    cls = model == "llava"
    config = preset("prumerge", LAYERS, cls, "outliers") if name == "outliers" else method(name, LAYERS, cls)
    inputs = ways.make(model, "left-padded")
    pruned = ways.build(model, "gap_triton")

    def run(inputs: dict[str, torch.Tensor]):
        gap_triton.configure(pruned, config)
        output = generate(pruned, inputs, tokens=3)
        return output, stages_of(gap_triton.last_selection(pruned))

    expected, stages = run(inputs)
    for value in BAD:
        output, found = run(spoilt(inputs, image, value))
        assert not output.logits[0][image].isfinite().all()
        other = 1 - image
        assert torch.equal(output.sequences[other], expected.sequences[other])
        for stage, reference in zip(found, stages, strict=True):
            if name != "outliers":  # where the other's number of tokens, so the width, depends on its values
                for field in ("index", "candidates", "score", "visual_index"):
                    assert torch.equal(getattr(stage, field)[other], getattr(reference, field)[other]), field
                assert torch.equal(stage.position_ids[..., other, :], reference.position_ids[..., other, :])
            rows = [x.visual_index[other][x.visual_index[other] >= 0] for x in (stage, reference)]
            assert torch.equal(*rows)
        for step, reference in zip(output.logits, expected.logits, strict=True):
            if name != "outliers":
                assert torch.equal(step[other], reference[other])
            assert float((step[other] - reference[other]).abs().max()) <= TOLERANCE


def test_where_tokens_merge_is_found_by_any_prompt_and_kept() -> None:
    model, inputs = ways.build("llava", "gap_triton"), ways.make("llava", "left-padded")
    bad = spoilt(spoilt(inputs, 0, BAD[0]), 1, BAD[0])
    gap_triton.configure(model, method("visionzip", LAYERS, cls=True))
    expected = generate(model, inputs)
    attachment = model.model.language_model._gap_attachment
    for prompts, found in (((bad,), None), ((bad, inputs), True), ((inputs, bad), True)):
        gap_triton.configure(model, method("visionzip", LAYERS, cls=True))
        outputs = [generate(model, each) for each in prompts]
        assert attachment.projector_is_last is found
        for each, output in zip(prompts, outputs, strict=True):
            assert each is bad or error(output, expected) == 0.0


def test_tiles_are_aggregated_alike_in_every_batch() -> None:
    """By the constants of the model, not by whether an image of the batch was cut into tiles: OneVision cuts no images of
    a sample that has several."""
    if "batch_num_images" not in inspect.signature(transformers.LlavaOnevisionModel.forward).parameters:
        pytest.skip("this release cuts every image")
    model = build("llava_onevision", "gap_triton")
    gap_triton.configure(model, GapConfig(0.4, -1, "received", "region", "aggregation"))
    embeds: list[torch.Tensor] = []
    embeds_of_prompt(model, embeds)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    several = [1, *[IMAGE] * 37, 30, *[IMAGE] * 37, 40]
    cut = [1, *[IMAGE] * (36 + 12 * 13), 40]
    ids = torch.tensor([several + [0] * (len(cut) - len(several)), cut])
    inputs = {
        "input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels,
        "image_sizes": torch.tensor([[48, 48]] * 3), "batch_num_images": torch.tensor([2, 1]),
    }  # fmt: skip
    alone = {key: value[:1] for key, value in inputs.items()} | {
        "pixel_values": pixels[:2], "image_sizes": inputs["image_sizes"][:2]
    }  # fmt: skip
    with torch.no_grad():
        model(**inputs)
        model(**alone)
    together, single = embeds
    torch.testing.assert_close(together[0], single[0])


DRAWS = {
    "before": GapConfig(0.4, -1, "random"),
    "before, by region": GapConfig(9, -1, "random", "region"),
    "inside, spread": GapConfig(0.4, 1, "random", "stride", seed=3),
    "three times": GapConfig(
        0.7, -1, "random", then=(Stage(0.5, 0, "random", "region"), Stage(5, 2, "random")), seed=2**63 - 1
    ),
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("config", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("model", [*ways.MODELS, "llava_next"])
def test_a_draw_is_that_of_the_sample_alone(model: str, config: GapConfig, padding: str) -> None:
    """At any row of any batch, however it is padded: what is drawn depends on the number of visual tokens alone."""
    images = [(Image(),), (Image(), Image(24, 48)), (Image(),), (Image(),) * 3]
    orders = [(0,), (1,), (2,), (3,), (0, 1, 2, 3), (3, 2, 1, 0), (2, 3)]
    pruned = ways.build(model, "gap_triton")
    gap_triton.configure(pruned, config)
    found: dict[int, list[list[list[int]]]] = {}
    for order in orders:
        inputs = prompt(
            "llava" if model == ways.MROPE else model,
            images=[images[i] for i in order],
            before=[(3, 1, 7, 2)[i] for i in order],
            after=[(5, 9, 4, 6)[i] for i in order],
            padding=padding,
        )
        if model == ways.MROPE:
            inputs = ways.as_mrope(inputs)
        with torch.no_grad():
            pruned(**inputs)
        starts = inputs["attention_mask"].int().argmax(1).tolist()
        for row, sample in enumerate(order):
            kept = [
                [i - starts[row] for i in stage.visual_index[row].tolist() if i >= 0]
                for stage in stages_of(gap_triton.last_selection(pruned))
            ]
            found.setdefault(sample, []).append(kept)
    for runs in found.values():
        assert all(run == runs[0] for run in runs)
    assert found[0][0] != found[1][0]
    # One number for each of its visual tokens, from a generator of this seed.
    if config is DRAWS["before"] and model != "llava_next":
        drawn = torch.rand(36, generator=torch.Generator().manual_seed(0))
        assert found[0][0][0] == [4 + i for i in sorted(drawn.topk(15).indices.tolist())]


def video_prompt() -> dict[str, torch.Tensor]:
    """Two samples of Qwen2.5-VL: a video of two frames, and an image beside a video of one."""
    frames = [[(VIDEO, 2)], [(IMAGE, 1), (VIDEO, 1)]]
    samples, images, videos = [], 0, []
    for sample in frames:
        ids = [1, 20, 21]
        for token, count in sample:
            ids += [ways.START, *[token] * (count * 36), ways.END, 30]
            images += token == IMAGE
            videos += [count] * (token == VIDEO)
        samples.append([*ids, 40, 41, 42])
    width = max(map(len, samples))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in samples])
    generator = torch.Generator().manual_seed(0)

    def pixels(count: int) -> torch.Tensor:
        return torch.randn(count * 144, 3 * 2 * ways.PATCH**2, generator=generator)

    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels(images),
        "image_grid_thw": torch.tensor([[1, 12, 12]] * images),
        "pixel_values_videos": pixels(sum(videos)),
        "video_grid_thw": torch.tensor([[count, 12, 12] for count in videos]),
    }
    if ways.V5:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


@pytest.mark.parametrize("name", ["nuwa", "visionzip", "spatial", "text", "feather", "region in the decoder"])
def test_videos(name: str) -> None:
    stages = compare(ways.MROPE, video_prompt(), method(name, LAYERS, cls=False))
    # Every frame and every image keeps its part: none of a sample's two grids goes without.
    for b, rows in enumerate(stages[0].visual_index):
        visual = stages[0].visual[b].nonzero()[:, 0]
        first = torch.isin(visual[:36], rows).sum()
        assert 0 < int(first) < int((rows >= 0).sum()) or name in ("text", "feather")


TILED = ["llava_next", "llava_onevision/qwen2"]
# Two images beside one, tiles of four shapes, 6 to 24 newlines in a sample.
TILES = ((Image(24, 48), Image(48, 24)), (Image(48, 48),), (Image(24, 24), Image(48, 48), Image(24, 48)))
ASKING = {
    "tower": GapConfig(0.5, -1, "received"),
    "spatial": GapConfig(0.5, -1, "spatial"),
    "region": GapConfig(0.5, -1, "random", "region"),
    "stride": GapConfig(0.5, -1, "text_similarity", "stride"),
    "aggregation": GapConfig(0.5, -1, "received", "region", "aggregation"),
    "contextual": GapConfig(0.5, -1, "key_norm", merge="contextual"),
    "nearest": GapConfig(0.5, -1, "received", merge="nearest"),
    "average": GapConfig(0.5, -1, "received", merge="average"),
    "max-min": GapConfig(0.5, -1, "random", "max_min"),
    "determinant": GapConfig(0.5, -1, "spatial", "determinant"),
    "coverage gain": GapConfig(0.5, -1, "received", "coverage_gain"),
    "least similar": GapConfig(0.5, -1, "received", "least_similar", "average"),
    "distinct": GapConfig(0.5, -1, "received", "distinct"),
    "anchors": GapConfig(0.5, -1, "received", "anchors"),
    "windows": GapConfig(0.5, -1, "received", "windows", "cluster"),
    "random": GapConfig(0.5, -1, "random"),
    "inside": GapConfig(0.5, 1, "spatial"),
    "inside, region": GapConfig(0.5, 1, "text", "region"),
    "inside, stride": GapConfig(0.5, 1, "text", "stride"),
    "inside, least similar": GapConfig(0.5, 1, "text", "least_similar"),
}


# These ask nowhere where tokens stand, so that newlines are tokens among others.
NO_GRID = ("random", "max-min")


def newlines_of(model: torch.nn.Module, embeds: torch.Tensor) -> torch.Tensor:
    """[B, Q] bool, the newline tokens in what the decoder is given."""
    return (embeds == model.model.image_newline).all(-1)


@pytest.mark.parametrize("asking", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("name", TILED)
def test_a_budget_counts_newlines(name: str, asking: GapConfig) -> None:
    """Exactly as many survive as ``keep`` says, in every sample, also where they are fewer than images or newlines."""
    model = build(name, "gap_triton")
    embeds: list[torch.Tensor] = []
    embeds_of_prompt(model, embeds)
    inputs = prompt(name, images=TILES, before=(3, 7, 2), after=(5, 9, 4))
    for keep in (1, 3, 16, 10_000, 0.005, 0.25):
        config = dataclasses.replace(asking, keep=keep)
        gap_triton.configure(model, config)
        with torch.no_grad():
            model(**inputs)
        selection = gap_triton.last_selection(model)
        counts = (inputs["input_ids"] == IMAGE).sum(1).tolist()
        expected = [config.count(count) for count in counts]
        if expected == counts:  # nothing is dropped
            continue
        assert (selection.visual_index >= 0).sum(1).tolist() == expected
        if config.layer == -1 and all(asking is not ASKING[each] for each in NO_GRID):
            newlines = newlines_of(model, embeds[-1])
            for b, total in enumerate(expected):
                rows = newlines[b].nonzero()[:, 0]
                stay = torch.isin(rows, selection.visual_index[b])
                most = max(total // 2, total - (counts[b] - len(rows)))
                assert int(stay.sum()) == min(len(rows), most)


@pytest.mark.parametrize("asking", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("name", TILED)
def test_keep_everything_keeps_newlines_too(name: str, asking: GapConfig) -> None:
    inputs = prompt(name, images=TILES, before=(3, 7, 2), after=(5, 9, 4))
    dense = generate(build(name, "sdpa"), inputs, tokens=2)
    model = build(name, "gap_triton")
    gap_triton.configure(model, dataclasses.replace(asking, keep=1.0))
    assert error(generate(model, inputs, tokens=2), dense) == 0.0


@pytest.mark.parametrize("keep", [9, 0.1])
@pytest.mark.parametrize("name", TILED)
def test_some_newlines_equal_the_oracle(name: str, keep: float) -> None:
    inputs = prompt(name, images=TILES, before=(3, 7, 2), after=(5, 9, 4))
    (first,) = compare(name, inputs, GapConfig(keep, -1, "received", "region", "aggregation"))
    assert first.score.isneginf().any()
    assert first.score.isposinf().any()


def test_newlines_that_stay_are_evenly_spread() -> None:
    model = build("llava_next", "gap_triton")
    gap_triton.configure(model, GapConfig(12, -1, "cls"))
    embeds: list[torch.Tensor] = []
    embeds_of_prompt(model, embeds)
    with torch.no_grad():
        model(**prompt("llava_next", images=((Image(48, 48),),), before=(3,), after=(4,)))
    rows = newlines_of(model, embeds[0])[0].nonzero()[:, 0]
    kept = torch.isin(rows, gap_triton.last_selection(model).visual_index[0]).nonzero()[:, 0].tolist()
    assert kept == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("keep", [1, 3, 0.01])
def test_a_budget_below_the_number_of_frames(keep: float) -> None:
    """A video of two frames, and an image beside a video: exactly as many as asked for, of any of them."""
    for config in (
        GapConfig(keep, -1, "spatial"),
        GapConfig(keep, -1, "received", "region", "aggregation"),
        GapConfig(keep, -1, "received", merge="nearest"),
        GapConfig(keep, -1, "key_norm", merge="contextual"),
        GapConfig(keep, 1, "last_token", "region"),
    ):
        (first,) = compare(ways.MROPE, video_prompt(), config)
        assert (first.visual_index >= 0).sum(1).tolist() == [config.count(72)] * 2


def test_a_prompt_that_ends_in_an_image_keeps_its_last_row_besides() -> None:
    """The documented exception: its logits are read. Here the last row is a newline."""
    inputs = prompt("llava_next", images=((Image(48, 48),), (Image(24, 24),)), before=(3, 5), after=(0, 0))
    inputs = inputs | {key: inputs[key][:, :-2] for key in ("input_ids", "attention_mask")}
    model = build("llava_next", "gap_triton")
    gap_triton.configure(model, GapConfig(1, -1, "cls"))
    with torch.no_grad():
        model(**inputs)
    assert (gap_triton.last_selection(model).visual_index >= 0).sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("name", TILED)
def test_newlines_all_stay_where_they_are_few(name: str) -> None:
    """They stand in no grid, and tell where a row of the picture ends."""
    model, inputs = build(name, "gap_triton"), make_prompt(name, "ragged-images")
    embeds: list[torch.Tensor] = []
    gap_triton.configure(model, method("nuwa", LAYERS, cls="next" in name))
    embeds_of_prompt(model, embeds)
    with torch.no_grad():
        model(**inputs)
    first = stages_of(gap_triton.last_selection(model))[0]
    newlines = newlines_of(model, embeds[0])
    assert int(newlines.sum(1).min()) >= 6
    for b in range(2):
        assert torch.isin(newlines[b].nonzero()[:, 0], first.index[b]).all()
        assert int((first.visual_index[b] >= 0).sum()) < int(first.visual[b].sum())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("model", ways.MODELS)
def test_a_copy_watches_its_own_vision_encoder(model: str, duplicate) -> None:
    original = ways.build(model, "gap_triton")
    gap_triton.configure(original, GapConfig.preset("nuwa", budget=SHARE, model=original))
    twin = duplicate(original)
    inputs = ways.make(model, "left-padded")
    expected = generate(original, inputs)
    gap_triton.detach(original)
    assert not [name for name in vars(original.model) if name.startswith("get_")]
    generate(original, inputs)
    output = generate(twin, inputs)
    assert torch.equal(output.sequences, expected.sequences)
    assert gap_triton.last_selection(twin) is not None
    assert gap_triton.last_selection(original) is None
