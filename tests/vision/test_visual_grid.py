"""``visual_grid``: the caller names the grids of decoders alone, and of models that tell none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support import families, ways
from support.lone import lone, merged, without
from support.prompts import make_prompt
from support.tiny import IMAGE, Image, build, generate, prompt
from support.towers import family

import gap_triton
from gap_triton import GapConfig
from gap_triton.integration.visual_grid import named_grids
from gap_triton.strategies import spatial_order

ASKING = {
    "before": GapConfig(0.25, -1, "spatial"),
    "inside": GapConfig(0.25, 1, "spatial"),
}


def decoder(config: GapConfig) -> torch.nn.Module:
    model = lone()
    gap_triton.attach(model, config)
    return model


def features(*counts: int) -> dict[str, torch.Tensor]:
    """Prompts of a decoder alone with ``counts`` visual tokens in a row each, padded on the left."""
    width = max(counts) + 7
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(counts), width, dtype=torch.bool)
    real = torch.zeros(len(counts), width, dtype=torch.long)
    for b, count in enumerate(counts):
        real[b, width - count - 7 :] = 1
        mask[b, width - count - 4 : width - 4] = True
    embeds = torch.randn(len(counts), width, 64, generator=generator)
    return {"inputs_embeds": embeds, "attention_mask": real, "visual_mask": mask}


def kept(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """The survivors of each sample, by their place among its visual tokens."""
    rows = gap_triton.last_selection(model).visual_index
    mask = inputs["visual_mask"].repeat_interleave(len(rows) // len(inputs["visual_mask"]), 0)
    return [
        torch.isin(m.nonzero()[:, 0], r).nonzero()[:, 0].tolist() for m, r in zip(mask, rows, strict=True)
    ]


def spread(*grids: tuple[int, int], share: float = 0.25) -> list[int]:
    """The first of a sample's tokens in the order of an even spread over its ``grids``, a share of each."""
    found, start = [], 0
    for grid in grids:
        count = grid[0] * grid[1]
        order = spatial_order(grid).argsort()[: round(share * count)]
        found += (order.sort().values + start).tolist()
        start += count
    return found


@pytest.mark.parametrize("config", ASKING.values(), ids=ASKING)
def test_a_count_alone_is_no_grid(config: GapConfig) -> None:
    """256 tokens may be 16 x 16; MiniGPT-v2's are 32 x 8."""
    model, inputs = decoder(config), features(256)
    with pytest.raises(
        ValueError, match=r"nothing tells how many rows and columns .*LlamaModel.*pass visual_grid=\[H, W\]"
    ):
        generate(model, inputs, tokens=2)
    generate(model, inputs | {"visual_grid": [32, 8]}, tokens=2)
    assert kept(model, inputs) == [spread((32, 8))]
    assert spread((32, 8)) != spread((16, 16))
    # Nothing is asked where no score and no coverage asks where tokens stand.
    gap_triton.configure(model, GapConfig(0.25, 1, "text"))
    generate(model, inputs, tokens=2)


@pytest.mark.parametrize("config", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}],
    ids=str,
)
def test_grids_of_several_images(config: GapConfig, options: dict[str, object]) -> None:
    model, inputs = decoder(config), features(32, 64)
    beams = options.get("num_beams", 1)
    for grid, expected in (
        ([4, 8], [[(4, 8)], [(4, 8)] * 2]),
        ((16, 2), [[(16, 2)], [(16, 2)] * 2]),
        ([[4, 8], [16, 4]], [[(4, 8)], [(16, 4)]]),
        ([(4, 8), (8, 4), (2, 16)], [[(4, 8)], [(8, 4), (2, 16)]]),
        (np.array([[4, 8], [8, 4], [2, 16]]), [[(4, 8)], [(8, 4), (2, 16)]]),
    ):
        generate(model, inputs | {"visual_grid": grid}, tokens=2, **options)
        if config.layer == -1 or not any(len(grids) > 1 for grids in expected):
            assert kept(model, inputs) == [spread(*grids) for grids in expected for _ in range(beams)]


def test_what_regions_and_strides_ask_is_named_too() -> None:
    inputs = features(64, 32)
    for coverage in ("region", "stride"):
        for layer in (-1, 1):
            model = decoder(GapConfig(8, layer, "random", coverage))
            found = []
            for grid in ([16, 2], [4, 8]):
                with torch.no_grad():
                    model(**inputs, visual_grid=grid)
                found.append(kept(model, inputs))
            assert found[0] != found[1]
            assert [len(rows) for rows in found[0]] == [8, 8]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([5, 5], r"sample 0 has 32 visual tokens of its images, which the sizes"),
        ([[4, 8]], r"sample 1 has 64 visual tokens of its images, which the sizes of the 1 images"),
        ([[4, 8], [8, 8], [2, 2]], r"3 images were given with the prompt, whose visual tokens belong to 2"),
        (torch.tensor([4, 8]), r"visual_grid is a tensor, .*visual_grid.tolist\(\)"),
        ([], r"visual_grid=\[\]: expected \[H, W\], two ints >= 1"),
        ("48", r"visual_grid='48': expected \[H, W\]"),
        (32, r"visual_grid=32: expected \[H, W\]"),
        ([4, 8, 1], r"visual_grid=\[4, 8, 1\]: expected"),
        ([0, 8], r"visual_grid=\[0, 8\]: expected"),
        ([4.0, 8], r"visual_grid=\[4.0, 8\]: expected"),
        ([True, 8], r"visual_grid=\[True, 8\]: expected"),
        ([[4, 8], None], r"visual_grid=\[\[4, 8\], None\]: expected"),
        ((each for each in (4, 8)), r"visual_grid=<generator .*: expected"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_grids(grid: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(decoder(ASKING["before"]), features(32, 64) | {"visual_grid": grid}, tokens=2)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.floats(), st.text(max_size=2), st.just(np.int64(3)),
    st.sampled_from([np.array(3), np.array([2, 3]), np.array([2.0, 3]), torch.tensor(3), {}, {1, 2}, object()]),
)  # fmt: skip


@given(ODD | st.lists(ODD, max_size=3) | st.lists(st.lists(ODD, max_size=3), max_size=3).map(tuple))
def test_odd_grids_are_grids_or_a_sentence(value: object) -> None:
    refusal, grids = None, None
    try:
        grids = named_grids(value)
    except ValueError as error:
        refusal = str(error)
    if grids is None:
        assert refusal.startswith("visual_grid")
        return
    for height, width in grids if isinstance(grids, list) else [grids]:
        assert type(height) is int
        assert type(width) is int
        assert min(height, width) >= 1


def test_one_grid_is_not_stretched_over_other_images() -> None:
    """Two images of one size and one grid in the list: only the samples of beams are the same image."""
    model, inputs = decoder(ASKING["before"]), features(32, 32)
    with pytest.raises(ValueError, match="sample 1 has 32 visual tokens of its images"):
        generate(model, inputs | {"visual_grid": [[4, 8]]}, tokens=2)
    generate(
        model, {key: value[:1] for key, value in inputs.items()} | {"visual_grid": [[4, 8]]}, num_beams=2
    )
    assert kept(model, inputs) == [spread((4, 8))] * 2


def test_new_images_of_a_later_turn() -> None:
    """The grid is that of the images among the new rows, as the mask is."""
    model, inputs = decoder(ASKING["inside"]), features(32)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, visual_grid=[4, 8], past_key_values=cache)
        model(inputs_embeds=torch.randn(1, 1, 64), past_key_values=cache, visual_grid=[4, 8])
        second = features(64)
        past = cache.get_seq_length()
        mask = torch.cat([torch.ones(1, past, dtype=torch.long), second["attention_mask"]], 1)
        model(
            inputs_embeds=second["inputs_embeds"], attention_mask=mask, visual_mask=second["visual_mask"],
            visual_grid=[16, 4], past_key_values=cache,
        )  # fmt: skip
    assert kept(model, second) == [spread((16, 4))]


def test_a_model_that_is_not_attached_takes_no_grid() -> None:
    inputs = without(features(32), "visual_mask") | {"visual_grid": [4, 8]}
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['visual_grid'\]"):
        generate(lone(), inputs, tokens=2)
    model = decoder(GapConfig(1.0, 1, "spatial"))
    dense = generate(lone(), without(inputs, "visual_grid"), tokens=2)
    pruned = generate(model, features(32) | {"visual_grid": [4, 8]}, tokens=2)
    assert torch.equal(pruned.sequences, dense.sequences)


def test_of_a_vision_language_model_the_caller_may_name_what_it_does_not_tell() -> None:
    """Image features of another size than the tower's, merged into the embeddings."""
    model = build("llava/llama", "gap_triton")
    gap_triton.configure(model, ASKING["before"])
    inputs = features(32, 32)
    with pytest.raises(ValueError, match=r"LlavaModel has 64 visual tokens.*pass visual_grid"):
        generate(model, inputs, tokens=2)
    generate(model, inputs | {"visual_grid": [4, 8]}, tokens=2)
    assert kept(model, inputs) == [spread((4, 8))] * 2
    # As many as there are images, where the model is given them.
    spared = make_prompt("llava", "ragged-images")
    mask = (spared["input_ids"] == IMAGE) & ((spared["input_ids"] == IMAGE).cumsum(1) > 36)
    for grid in ({}, {"visual_grid": [6, 6]}):
        with pytest.raises(ValueError, match=r"72 visual tokens, and (each of 4 images|pixel_values hold 4)"):
            model(**spared, visual_mask=mask, **grid)
    # And as many as the vision encoder made, in models whose samples are filled up with images of zeros.
    filled = family("idefics3")
    filled.set_attn_implementation("gap_triton")
    gap_triton.configure(filled, GapConfig(0.5, -1, "received"))
    inputs = families.prompt_with_pixels(filled, "images by sample")
    mask = (inputs["input_ids"] == IMAGE) & ((inputs["input_ids"] == IMAGE).cumsum(1) > 9)
    with torch.no_grad():
        filled(**inputs)
    with pytest.raises(ValueError, match="visual tokens, and the vision encoder made 27"):
        filled(**inputs, visual_mask=mask)
    # Merged features of its own tower are of the size that the tower has learned.
    own = merged("llama", make_prompt("llava", "left-padded"))
    generate(model, own, tokens=2)
    assert kept(model, own) == [spread((6, 6))] * 2


def test_of_a_model_with_grids_that_was_given_none() -> None:
    model = ways.build(ways.MROPE, "gap_triton")
    gap_triton.configure(model, ASKING["inside"])
    inputs = features(32, 64)
    with pytest.raises(ValueError, match="was not given image_grid_thw"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs, visual_grid=[[4, 8], [16, 4]])
    assert kept(model, inputs) == [spread((4, 8)), spread((16, 4))]


@pytest.mark.parametrize("name", [ways.MROPE, "llava_next"])
def test_a_model_that_tells_its_grids_refuses_another(name: str) -> None:
    model = ways.build(name, "gap_triton")
    gap_triton.configure(model, ASKING["inside"])
    inputs = ways.make(name, "single") if name == ways.MROPE else prompt(name, ((Image(),),), (3,), (4,))
    assert (inputs["input_ids"] == IMAGE).any()
    with pytest.raises(
        ValueError, match=r"visual_grid=\(6, 6\): .* tells the grids of its images itself; leave it out"
    ):
        generate(model, inputs | {"visual_grid": [6, 6]}, tokens=2)
