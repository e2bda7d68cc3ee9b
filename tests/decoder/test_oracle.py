"""Dropping after layer K must equal not dropping and masking those columns in the later layers."""

from __future__ import annotations

import pytest
import torch
from support.comparison import TOLERANCE, error
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle
from support.prompts import BATCHES, make_prompt
from support.tiny import LAYERS, build, generate, prompt

import gap_triton
from gap_triton import GapConfig

MODELS = [
    "llava",
    "llava/qwen2",
    "llava/mistral",
    "llava/mistral-sliding",
    "llava_next",
    "llava_next/mistral",
    "llava_onevision/qwen2",
]


def compare(
    name: str, inputs: dict[str, torch.Tensor], config: GapConfig, **options: object
) -> MaskingOracle:
    model = build(name, "gap_triton")
    gap_triton.configure(model, config)
    pruned = generate(model, inputs, **options)
    reference = build(name, {"text_config": ORACLE})
    with MaskingOracle(reference, config.layer, config.keep, config.score) as oracle:
        expected = generate(reference, inputs, **options)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE
    assert all(bool(step.isfinite().all()) for step in pruned.logits)
    return oracle


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 2])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, layer: int) -> None:
    inputs = make_prompt(name, "left-padded")
    oracle = compare(name, inputs, GapConfig(keep=0.4, layer=layer))
    assert oracle.dropped.any()


@pytest.mark.parametrize("score", ["last_token", "text"])
@pytest.mark.parametrize("keep", [0.25, 0.7, 1, 20])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: str, keep: float | int, score: str) -> None:
    oracle = compare("llava", make_prompt("llava", batch), GapConfig(keep=keep, layer=1, score=score))
    assert oracle.dropped.any()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "name", ["llava/qwen2", "llava_next", "llava_onevision/qwen2", "llava/mistral-sliding"]
)
def test_batches_of_other_models(name: str, batch: str) -> None:
    compare(name, make_prompt(name, batch), GapConfig(keep=0.4, layer=1))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("batch", ["left-padded", "right-padded", "ragged-images"])
def test_text_score_on_a_sliding_layer(batch: str, layer: int) -> None:
    compare(
        "llava/mistral-sliding", make_prompt("llava", batch), GapConfig(keep=0.4, layer=layer, score="text")
    )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_keep_everything_is_sdpa_bit_for_bit(name: str, batch: str) -> None:
    inputs = make_prompt(name, batch)
    dense = generate(build(name, "sdpa"), inputs)
    model = build(name, "gap_triton")
    for keep in (1.0, 10_000):
        gap_triton.configure(model, GapConfig(keep=keep, layer=1))
        pruned = generate(model, inputs)
        assert torch.equal(pruned.sequences, dense.sequences)
        assert error(pruned, dense) == 0.0


def test_pruning_changes_the_logits() -> None:
    """Guards the tests above: an oracle that drops nothing, next to a model that drops nothing, would agree too."""
    inputs = make_prompt("llava", "even")
    dense = generate(build("llava", "sdpa"), inputs)
    model = build("llava", "gap_triton")
    gap_triton.configure(model, GapConfig(keep=0.4, layer=1))
    assert error(generate(model, inputs), dense) > 100 * TOLERANCE


def test_text_only_prompt_is_sdpa_bit_for_bit() -> None:
    inputs = prompt("llava", images=((), ()))
    dense = generate(build("llava", "sdpa"), inputs)
    pruned = generate(build("llava", "gap_triton"), inputs)
    assert error(pruned, dense) == 0.0


@pytest.mark.parametrize("batch", ["even", "left-padded", "right-padded"])
def test_a_forward_gives_logits_of_prompt_length(batch: str) -> None:
    inputs = make_prompt("llava", batch)
    model = build("llava", "gap_triton")
    gap_triton.configure(model, GapConfig(keep=0.4, layer=1))
    reference = build("llava", {"text_config": ORACLE})
    with torch.no_grad():
        pruned = model(**inputs).logits
        with MaskingOracle(reference, 1, 0.4) as oracle:
            expected = reference(**inputs).logits
    assert pruned.shape == expected.shape
    stays = inputs["attention_mask"].bool() & ~oracle.dropped
    assert float((pruned - expected)[stays].abs().max()) <= TOLERANCE
    assert bool((pruned[oracle.dropped] == 0).all())


def test_inputs_embeds() -> None:
    inputs = make_prompt("llava", "left-padded")
    reference = build("llava", {"text_config": ORACLE})
    model = build("llava", "gap_triton")
    gap_triton.configure(model, GapConfig(keep=0.4, layer=1))
    embedded = {key: value for key, value in inputs.items() if key != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with MaskingOracle(reference, 1, 0.4) as oracle:
        expected = generate(reference, inputs)
    pruned = generate(model, embedded)
    assert oracle.dropped.any()
    assert error(pruned, expected) <= TOLERANCE
