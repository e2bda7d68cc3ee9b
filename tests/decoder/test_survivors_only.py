"""Decoders that are handed the survivors alone: recurrent, convolving, choosing what they attend to, sharing keys."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import transformers
from packaging.version import Version
from support import families, model_types
from support.comparison import TOLERANCE, error
from support.hooks import hooks
from support.installed_types import build_or_skip
from support.lone import LoneOracle
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle, core_of
from support.prompts import make_prompt
from support.survivors import (
    CONFIG,
    LARGE_LOGITS,
    TOKENS,
    SurvivorsOracle,
    difference,
    expected_of,
    pruned_by,
    stays_of,
)
from support.tiny import IMAGE, LAYERS, PAD, generate, seed_weights

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.integration import stages, survivors_only
from gap_triton.later_layers import inputs as later_inputs

BY_NAME = {
    "qwen3_5": "at decoder layer 3, by GapConfig(layer=3), because",
    "gemma4": "at decoder layer 0, by GapConfig(layer=0), because",
    "llama4": "before its decoder, by GapConfig(layer=-1, score='text_similarity'), because",
}


@pytest.mark.parametrize("model_type", model_types.NOT_PLAIN)
def test_dropping_equals_a_prompt_without_the_dropped_tokens(model_type: str) -> None:
    """Images in both samples of a left-padded batch, of which as many are left: filler, a cache and steps, against none."""
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    reason, layers = model_types.NOT_PLAIN[model_type], model_types.PRUNING_LAYERS.get(model_type, ())
    refuse_in_the_decoder(model, reason, layers)
    inputs = families.prompt(model)
    with families.visual_features(model):
        dense = generate(model, inputs, tokens=TOKENS)
    everything, _ = pruned_by(model, inputs, GapConfig(1.0, -1, "random"))
    assert torch.equal(everything.sequences, dense.sequences)
    assert error(everything, dense) == 0.0
    pruned, stays = pruned_by(model, inputs)
    if model_type in model_types.MASKED:
        core_of(reference)[1].set_attn_implementation(ORACLE)
        gone = inputs["attention_mask"].bool() & ~stays
        with families.visual_features(reference), MaskingOracle(reference, -1, 0.4, "random", gone):
            expected = generate(reference, inputs, tokens=TOKENS)
        assert torch.equal(pruned.sequences, expected.sequences)
        assert error(pruned, expected) <= TOLERANCE
        unpruned = dense.logits
    else:
        expected = expected_of(reference, inputs, pruned.sequences, stays)
        assert difference(pruned, expected) <= TOLERANCE
        unpruned = expected_of(reference, inputs, pruned.sequences, None)
    # Guards the lines above: a model that drops nothing, next to an oracle that drops nothing, would agree too.
    assert difference(pruned, unpruned) > 100 * TOLERANCE


def refuse_in_the_decoder(model: transformers.PreTrainedModel, reason: str, layers: tuple[int, ...]) -> None:
    """Check that it is but at ``layers``, with what works instead."""
    instead = r"Before its decoder it can: use GapConfig\(layer=-1, score='text_similarity'\)"
    where = " in its decoder"
    if layers:
        wrong = next((layer for layer in range(LAYERS - 1) if layer not in layers), None)
        where, instead = (
            f" at decoder layer {wrong}",
            f"At layer {', '.join(map(str, layers))} it can. {instead}",
        )
    if not layers or wrong is not None:
        with pytest.raises(ValueError, match=rf"{where}: .*{reason}.* {instead}"):
            gap_triton.attach(model, GapConfig(layer=wrong if layers else 2))
        both = GapConfig(0.5, -1, "random", then=(Stage(0.2, wrong if layers else 2, "text"),))
        with pytest.raises(ValueError, match=rf"{where}: .*{reason}.* {instead}"):
            gap_triton.attach(model, both)
    with pytest.raises(ValueError, match=r"GapConfig.ids='compacted': renumbering is not defined for"):
        gap_triton.attach(model, GapConfig(0.5, -1, "random", ids="compacted"))
    assert hooks(model) == 0


@pytest.mark.parametrize("model_type", model_types.PRUNING_LAYERS)
def test_dropping_in_the_decoder(model_type: str) -> None:
    """Layers up to the pruning layer see every token, recurrent ones too; those behind it survivors only."""
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    inputs, layers = families.prompt(model), model_types.PRUNING_LAYERS[model_type]
    for layer in dict.fromkeys((layers[0], layers[-1])):
        pruned, stays = pruned_by(model, inputs, GapConfig(0.4, layer, "text"))
        assert torch.equal(inputs["attention_mask"].bool() & ~stays, ranked_last(reference, inputs, layer))
        if model_type in model_types.LOOKS_AHEAD:
            expected = masked(reference, inputs, stays, layer)
        else:
            expected = expected_of(reference, inputs, pruned.sequences, stays, layer=layer)
        assert difference(pruned, expected) <= TOLERANCE
        if layer == layers[0]:  # behind the last one there is little left to differ by
            elsewhere = expected_of(reference, inputs, pruned.sequences, stays)
            assert difference(pruned, elsewhere) > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", model_types.PRUNING_LAYERS)
def test_dropping_before_and_in_the_decoder(model_type: str) -> None:
    """Layers up to the pruning layer see what the first stage leaves, and those behind it what both leave."""
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    inputs, layer = families.prompt(model), model_types.PRUNING_LAYERS[model_type][0]
    config = GapConfig(0.7, -1, "random", then=(Stage(0.3, layer, "text"),))
    with families.visual_features(model), gap_triton.pruning(model, config):
        pruned = generate(model, inputs, tokens=TOKENS)
        selection = gap_triton.last_selection(model)
    before, stays = (stays_of(each, inputs["attention_mask"]) for each in (selection.before, selection))
    assert bool((before & ~stays).any(dim=1).all())
    if model_type in model_types.LOOKS_AHEAD:
        expected = masked(reference, inputs, before, -1, then=[(layer, before & ~stays)])
    else:
        expected = expected_of(reference, inputs, pruned.sequences, stays, layer=layer, before=before)
    assert difference(pruned, expected) <= TOLERANCE
    elsewhere = expected_of(reference, inputs, pruned.sequences, stays, layer=layer)
    assert difference(pruned, elsewhere) > 100 * TOLERANCE


def ranked_last(
    reference: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor], layer: int
) -> torch.Tensor:
    """[B, Q] bool, what eager attention of ``layer``, which sees every token, weighs least in the rows behind the image."""
    core_of(reference)[1].set_attn_implementation(ORACLE)
    with (
        torch.no_grad(),
        families.visual_features(reference),
        MaskingOracle(reference, layer, 0.4, "text") as oracle,
    ):
        reference(**inputs)
    core_of(reference)[1].set_attn_implementation("sdpa")
    assert oracle.dropped is not None
    return oracle.dropped


def masked(
    reference: transformers.PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    stays: torch.Tensor,
    layer: int,
    then: Sequence[tuple[int, torch.Tensor]] = (),
) -> list[torch.Tensor]:
    """Logits of each token by a model that masks what is gone, and ``then`` more, for decoders of attention alone."""
    core_of(reference)[1].set_attn_implementation(ORACLE)
    gone = inputs["attention_mask"].bool() & ~stays
    with families.visual_features(reference), MaskingOracle(reference, layer, 0.4, "text", gone, then):
        logits = generate(reference, inputs, tokens=TOKENS).logits
    core_of(reference)[1].set_attn_implementation("sdpa")
    return list(logits)


@pytest.mark.parametrize(
    "model_type", ["qwen3_5", "lfm3_vl", "llama4", "gemma4", "inkling2", "mistral_large4"]
)
def test_padding_on_the_right(model_type: str) -> None:
    """One forward, without a cache, in which ids with gaps would be read as packed sequences if there were no mask."""
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    inputs = families.prompt(model, padding="right")
    mask = inputs["attention_mask"]
    if not hasattr(core_of(model)[0], "get_rope_index"):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), families.visual_features(model), gap_triton.pruning(model, CONFIG):
        pruned = model(**inputs, use_cache=False).logits
        stays = stays_of(gap_triton.last_selection(model), mask)
    with torch.no_grad(), families.visual_features(reference):
        with SurvivorsOracle(reference, stays, mask.shape[1]):
            expected = reference(**inputs, use_cache=False).logits
        unpruned = reference(**inputs, use_cache=False).logits
    assert float((pruned - expected)[stays].abs().max()) <= LARGE_LOGITS
    assert float((unpruned - expected)[stays].abs().max()) > 100 * TOLERANCE


def test_ids_with_gaps_and_no_mask_are_read_as_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a decoder is always handed a mask."""
    model = build_or_skip("lfm2_vl")
    inputs = {name: value[1:] for name, value in families.prompt(model).items()}
    outputs = []
    for _ in range(2):
        with torch.no_grad(), families.visual_features(model), gap_triton.pruning(model, CONFIG):
            outputs.append(model(**inputs, use_cache=False).logits[:, -1])
        monkeypatch.setattr(survivors_only, "_mask_of_held", lambda *_: None)
    assert float((outputs[0] - outputs[1]).abs().max()) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "score"),
    [
        *((name, "received") for name in model_types.IMAGES_BEFORE),
        ("lfm2_vl", "spatial"),
        ("gemma4", "spatial"),
    ],
)
def test_scores_of_the_vision_encoder(model_type: str, score: str) -> None:
    """Its own images, scored where they are encoded: inside of `generate`, before the forward."""
    if Version(transformers.__version__) < Version(model_types.IMAGES_SINCE[model_type]):
        pytest.skip("this transformers calls the vision tower in another way")
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    inputs = families.prompt_with_pixels(model, model_types.IMAGES_BEFORE[model_type])
    with gap_triton.pruning(model, GapConfig(0.4, -1, score, "region" if score == "received" else "topk")):
        pruned = generate(model, inputs, tokens=TOKENS)
        stays = stays_of(gap_triton.last_selection(model), inputs["attention_mask"])
    expected = expected_of(reference, inputs, pruned.sequences, stays, features=False)
    assert difference(pruned, expected) <= TOLERANCE


@pytest.mark.parametrize("model_type", BY_NAME)
def test_by_name(model_type: str, warnings: pytest.LogCaptureFixture) -> None:
    named, model = build_or_skip(model_type, {"text_config": "gap_triton"}), build_or_skip(model_type)
    assert BY_NAME[model_type] in warnings.text
    inputs = families.prompt(model)
    with families.visual_features(named):
        by_name = generate(named, inputs, tokens=2)
        assert gap_triton.last_selection(named) is not None
    with families.visual_features(model), gap_triton.pruning(model):
        attached = generate(model, inputs, tokens=2)
    assert torch.equal(by_name.sequences, attached.sequences)
    assert error(by_name, attached) <= TOLERANCE


@pytest.mark.parametrize("model_type", model_types.OWN_ATTENTION)
def test_by_name_where_attention_is_more_than_it_names(model_type: str) -> None:
    build_or_skip(model_type)
    with pytest.raises(ValueError, match=r"load it under that and call gap_triton.attach\(model, GapConfig"):
        families.build(model_type, {"text_config": "gap_triton"})


def with_blocks_of_four(topk: int) -> transformers.PreTrainedModel:
    """MiniMax M3, each row of which attends to ``topk`` blocks of four tokens, the last of them its own."""
    model = build_or_skip("minimax_m3_vl")
    for layer in core_of(model)[1].layers[1:]:
        layer.self_attn.indexer.block_size, layer.self_attn.indexer.topk_blocks = 4, topk
    return model


def test_an_index_of_blocks_counts_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares position ids with places in its cache, and is handed places; in prompt and steps, in any cache."""
    inputs = {name: value[1:] for name, value in families.prompt(with_blocks_of_four(2)).items()}
    model, (pruned, stays) = with_blocks_of_four(2), pruned_by(with_blocks_of_four(2), inputs)
    expected = expected_of(with_blocks_of_four(2), inputs, pruned.sequences, stays)
    assert difference(pruned, expected) <= TOLERANCE
    static, _ = pruned_by(model, inputs, cache_implementation="static")
    assert error(static, pruned) <= TOLERANCE
    # Guards the lines above: the index leaves something out, of which more would be seen.
    every = expected_of(with_blocks_of_four(99), inputs, pruned.sequences, stays)
    assert difference(pruned, every) > 100 * TOLERANCE
    monkeypatch.setattr(survivors_only, "BY_PLACES", ())
    with pytest.raises(
        (RuntimeError, IndexError), match="out of bounds"
    ):  # ids stand in blocks that there are not
        pruned_by(model, inputs)


def gemma3n() -> transformers.PreTrainedModel:
    """The decoder alone of Gemma 3n, whose vision tower needs timm: the last layers attend to keys of earlier ones."""
    sizes = {
        key: families.TEXT_SIZES[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "sliding_window")
    }
    kinds = [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ]
    config = transformers.Gemma3nTextConfig(
        **sizes,
        vocab_size_per_layer_input=200,
        hidden_size_per_layer_input=8,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        layer_types=kinds,
        activation_sparsity_pattern=[0.0] * 5,
        laurel_rank=4,
        pad_token_id=PAD,
    )
    return seed_weights(transformers.Gemma3nForCausalLM._from_config(config, attn_implementation="sdpa"))


def test_a_decoder_alone_that_is_given_tokens() -> None:
    """It makes inputs of each layer from the tokens, so it is handed the tokens that are left."""
    model, reference = gemma3n(), gemma3n()
    inputs = make_prompt("llava", "left-padded")
    del inputs["pixel_values"]
    visual = inputs["input_ids"] == IMAGE
    with gap_triton.pruning(model, CONFIG):
        pruned = generate(model, inputs | {"visual_mask": visual}, tokens=TOKENS)
        stays = stays_of(gap_triton.last_selection(model), inputs["attention_mask"])
    reference.model.set_attn_implementation(ORACLE)
    with LoneOracle(reference, -1, 0.4, visual) as oracle:
        oracle.chosen = inputs["attention_mask"].bool() & ~stays
        expected = generate(reference, inputs, tokens=TOKENS)
    assert oracle.chosen.any()
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE


# --------------------------------------------------------------------------------------------- broken on purpose
def compacted(name: str, value: object, shortened: object) -> object:
    """The survivors' ids without gaps."""
    if name != "position_ids":
        return shortened
    return torch.arange(shortened.shape[-1]).expand_as(shortened)


def first_rows(name: str, value: object, shortened: object) -> object:
    """Inputs of each layer by number and not by token."""
    per_layer = name in ("per_layer_inputs", "ple_input_ids") and value is not None
    return value[:, : shortened.shape[1]] if per_layer else shortened


def change_taken(monkeypatch: pytest.MonkeyPatch, change) -> None:
    take = survivors_only.take_survivors
    monkeypatch.setattr(
        survivors_only,
        "take_survivors",
        lambda rows, survivors, name, value: change(name, value, take(rows, survivors, name, value)),
    )


def change_mask(monkeypatch: pytest.MonkeyPatch, change) -> None:
    make = survivors_only._mask_of_held
    monkeypatch.setattr(survivors_only, "_mask_of_held", lambda *args: change(make(*args)))


def by_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, chunks and distances count what is left."""
    monkeypatch.setattr("gap_triton.integration.hooks.hand_positions", lambda *args: None)


BROKEN = {
    "ids without gaps": lambda patch: change_taken(patch, compacted),
    "inputs of layers not gathered": lambda patch: change_taken(patch, first_rows),
    "filler is seen": lambda patch: change_mask(patch, torch.ones_like),
    "places in the cache": by_places,
}
KINDS = {
    "linear attention": ("qwen3_5", ("ids without gaps", "filler is seen")),
    "state space": ("nemotron_h_omni", ("filler is seen",)),
    "convolution": ("lfm2_vl", ("ids without gaps", "filler is seen")),
    "window": ("lfm3_vl", ("ids without gaps", "filler is seen", "places in the cache")),
    "chunk": ("llama4", ("ids without gaps", "filler is seen", "places in the cache")),
    "shared keys": ("gemma4", ("ids without gaps", "inputs of layers not gathered", "places in the cache")),
    "index": ("mistral_large4", ("ids without gaps", "filler is seen")),
    "index and inputs of layers": ("qwen4_exp", ("ids without gaps", "inputs of layers not gathered")),
    "distance": ("inkling2", ("filler is seen", "places in the cache")),
}


@pytest.mark.parametrize(
    ("kind", "fault"), [(kind, fault) for kind, (_, faults) in KINDS.items() for fault in faults]
)
def test_each_kind_of_layer_shows_a_broken_mechanism(
    kind: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would say if the mechanism were broken: another answer, and not just rounding."""
    model = build_or_skip(KINDS[kind][0])
    inputs = families.prompt(model)
    right, stays = pruned_by(model, inputs)
    BROKEN[fault](monkeypatch)
    wrong, stay_too = pruned_by(model, inputs)
    assert torch.equal(stays, stay_too)
    assert difference(wrong, right.logits) > 100 * TOLERANCE


def test_a_state_behind_the_pruning_layer_shows_filler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_or_skip("qwen3_5")
    inputs, config = families.prompt(model), GapConfig(0.4, 1, "text")
    right, stays = pruned_by(model, inputs, config)
    monkeypatch.setattr(later_inputs, "_later_padding", lambda survivors, mask: None)
    wrong, stay_too = pruned_by(model, inputs, config)
    assert torch.equal(stays, stay_too)
    assert difference(wrong, right.logits) > 100 * TOLERANCE


def test_keys_that_are_shared_across_the_pruning_layer_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `stages` keeps out: layer 3 attends to the keys of layer 1, which has seen every token."""
    model = build_or_skip("gemma4")
    inputs = families.prompt(model)
    monkeypatch.setattr(stages, "_shares_across", lambda text, layer: False)
    with pytest.raises((AttributeError, RuntimeError), match=r"no attribute|must match"):
        pruned_by(model, inputs, GapConfig(0.4, 1, "text"))
