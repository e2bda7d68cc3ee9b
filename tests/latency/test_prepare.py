"""`gap_triton.prepare`: what a prompt holds is read on the host, once, and is right for every way to use the prompt."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gap_kernels import read_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparison import TOLERANCE, error
from support.lone import lone, merged
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle
from support.prompts import make_prompt
from support.tiny import IMAGE, build, generate
from support.ways import CONFIG, MODELS, make
from support.ways import build as build_way

import gap_triton
from gap_triton import GapConfig, Stage, VisualPrompt
from gap_triton.latency import count
from gap_triton.visual_prompt import count_rows

CPU = torch.device("cpu")
SAMPLED = {"num_return_sequences": 2, "do_sample": True}


def attached(name: str, config: GapConfig = CONFIG) -> transformers.PreTrainedModel:
    model = build_way(name, "gap_triton")
    gap_triton.configure(model, config)
    return model


def reads(model: Any, inputs: dict[str, Any], **options: object) -> int:
    with torch.no_grad():
        return count(lambda: model(**inputs, **options), CPU).reads


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"use_cache": False}, SAMPLED],
    ids=["greedy", "beams", "no cache", "sampled"],
)
@pytest.mark.parametrize("batch", ["left-padded", "ragged-images", "one-without-image", "ends-in-image"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_writes_what_it_writes_without(name: str, batch: str, options: dict[str, Any]) -> None:
    """On the CPU the counts are compared with those of the rows, so none of them is wrong in any of these."""
    model, inputs = attached(name), make(name, batch)
    outputs = []
    for given_inputs in (inputs, gap_triton.prepare(model, inputs)):
        torch.manual_seed(0)
        outputs.append(generate(model, given_inputs, tokens=3, **options))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert error(outputs[1], outputs[0]) == 0.0


def test_a_prepared_prompt_equals_the_oracle() -> None:
    inputs = make_prompt("llava", "ragged-images")
    model = attached("llava")
    pruned = generate(model, gap_triton.prepare(model, inputs))
    reference = build("llava", {"text_config": ORACLE})
    with MaskingOracle(reference, CONFIG.layer, CONFIG.keep, CONFIG.score) as oracle:
        expected = generate(reference, inputs)
    assert oracle.dropped.any()
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE


def test_what_is_prepared_goes_with_the_inputs() -> None:
    model, inputs = attached("llava"), transformers.BatchFeature(make_prompt("llava", "left-padded"))
    prepared = gap_triton.prepare(model, inputs)
    assert "visual_prompt" not in inputs
    assert type(prepared) is transformers.BatchFeature
    moved = prepared.to("cpu", torch.float32)
    assert moved["visual_prompt"] is prepared["visual_prompt"]
    counts = moved["visual_prompt"].counts
    for copied in (copy.deepcopy(moved["visual_prompt"]), pickle.loads(pickle.dumps(moved["visual_prompt"]))):
        assert copied.counts == counts
    assert counts.visual == tuple((inputs["input_ids"] == IMAGE).sum(1).tolist())
    assert repr(moved["visual_prompt"]).startswith("VisualPrompt(shape=[2, ")


def test_sizes_of_images_stay_on_the_host() -> None:
    inputs = make("qwen2_5_vl", "left-padded")
    sizes = gap_triton.prepare(attached("qwen2_5_vl"), inputs)["visual_prompt"].sizes
    assert sizes == {"image_grid_thw": inputs["image_grid_thw"].tolist()}


def test_nothing_is_read_of_a_decoder_alone() -> None:
    model, inputs = lone("llama"), merged("llama", make_prompt("llava", "left-padded"))
    gap_triton.attach(model, GapConfig(0.6, 0, "text", then=(Stage(0.3, 2, "last_token"),)))
    prepared = gap_triton.prepare(model, inputs)
    unpruned = lone("llama")
    plain = count(
        lambda: unpruned(inputs_embeds=inputs["inputs_embeds"], attention_mask=inputs["attention_mask"]),
        CPU,
    )
    assert reads(model, inputs) == plain.reads + 1
    assert reads(model, prepared) == plain.reads
    with torch.no_grad():
        assert torch.equal(model(**prepared).logits, model(**inputs).logits)


@pytest.mark.parametrize("logits", [0, 1, 4, 9])
def test_rows_whose_logits_are_wanted(logits: int) -> None:
    """As for drafts: the last rows are answer, where no visual token is among them."""
    model = attached("llava")
    for batch in ("left-padded", "ends-in-image"):
        inputs = make_prompt("llava", batch)
        with torch.no_grad():
            expected = model(**inputs, logits_to_keep=logits).logits
            found = model(**gap_triton.prepare(model, inputs), logits_to_keep=logits).logits
        assert torch.equal(found, expected)


def test_labels_are_read_all_the_same() -> None:
    model, inputs = attached("llava"), make_prompt("llava", "left-padded")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
        found = model(**gap_triton.prepare(model, inputs), labels=labels)
    assert torch.equal(found.logits, expected.logits)


def test_another_turn_is_prepared_as_a_whole() -> None:
    """`generate` gets the whole conversation, and the forward only what the cache lacks."""
    model, inputs = attached("llava", GapConfig(0.4, 1)), make_prompt("llava", "left-padded")
    caches = [transformers.DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
    outputs = []
    for cache, is_prepared in zip(caches, (False, True), strict=True):
        first = generate(model, inputs, past_key_values=cache)
        ids = torch.cat([first.sequences, first.sequences[:, -4:], inputs["input_ids"]], dim=1)
        mask = torch.nn.functional.pad(
            inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1
        )
        ids = torch.where((torch.arange(ids.shape[1]) >= first.sequences.shape[1]) & (ids == 0), 3, ids)
        turn = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
        turn = gap_triton.prepare(model, turn) if is_prepared else turn
        outputs.append(generate(model, turn, past_key_values=cache))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert error(outputs[1], outputs[0]) == 0.0


def test_what_belongs_to_other_inputs_is_refused() -> None:
    model, inputs = attached("llava"), make_prompt("llava", "left-padded")
    prepared = gap_triton.prepare(model, inputs)["visual_prompt"]
    shorter = {name: value[:, 1:] if name != "pixel_values" else value for name, value in inputs.items()}
    with pytest.raises(
        ValueError, match=r"visual_prompt was prepared for 2 prompts of \d+ tokens, and this forward has 2 of"
    ):
        model(**shorter, visual_prompt=prepared)
    padded = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    with pytest.raises(
        ValueError,
        match=r"visual_prompt was prepared for other tokens or other padding: call gap_triton.prepare",
    ):
        model(**padded, visual_prompt=prepared)
    with pytest.raises(ValueError, match="visual_prompt is dict: expected what"):
        model(**inputs, visual_prompt={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "inputs hold neither input_ids with image placeholders nor visual_mask"),
        (
            {"input_ids": torch.ones(2, 3, device="meta").long()},
            "input_ids is on meta: gap_triton.prepare reads on the host",
        ),
        (
            {"attention_mask": torch.ones(2, 3)},
            r"attention_mask has shape \[2, 3\]: expected that of the tokens",
        ),
        (
            {"visual_mask": torch.ones(2, 3)},
            r"visual tokens are given by float32 \[2, 3\]: expected input_ids",
        ),
        ({"visual_mask": torch.ones(2, 3).bool()}, "visual_mask names rows that hold no image placeholder"),
    ],
)
def test_bad_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gap_triton.prepare(attached("llava"), {**make_prompt("llava", "left-padded"), **change})


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.data())
def test_counts_are_those_of_the_operator(length: int, data: st.DataObject) -> None:
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    visual, real = (np.array(data.draw(st.lists(row, min_size=2, max_size=2))) for _ in range(2))
    drafts = data.draw(st.integers(0, length - 1))
    visual[:, length - drafts :] = False
    answer = torch.arange(length) >= length - drafts
    rows = read_prompt(torch.tensor(visual), attention_mask=torch.tensor(real), answer=answer.expand(2, -1))
    assert list(map(list, count_rows(visual, real, drafts))) == rows.counts.tolist()


def test_counts_of_repeated_prompts() -> None:
    prompt = VisualPrompt(
        np.eye(2, 3, dtype=bool),
        np.ones((2, 3), bool),
        count_rows(np.eye(2, 3, dtype=bool), np.ones((2, 3), bool)),
    )
    counts, drafts = prompt.counts_of(4, 3, 0, 0)
    assert (counts.text, drafts) == ((2, 2, 1, 1), 0)
    with pytest.raises(ValueError, match="2 prompts of 3 tokens, and this forward has 3 of 3"):
        prompt.counts_of(3, 3, 0, 0)
