"""What can't be supported is refused with a sentence that says why and what to do."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from support.prompts import make_prompt
from support.tiny import LAYERS, TEXT, build, generate, prompt

import gap_triton
from gap_triton import GapConfig, _requirements
from gap_triton.arguments import CACHE
from gap_triton.integration import attention


def mllama(attn_implementation: str) -> transformers.PreTrainedModel:
    config = transformers.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 24,
            "patch_size": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        text_config={**TEXT, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}},
    )
    return transformers.MllamaForConditionalGeneration._from_config(
        config, attn_implementation=attn_implementation
    )


def test_cross_attention_by_name() -> None:
    with pytest.raises(ValueError, match=r"can't prune Mllama.* cross-attention.*attn_implementation='sdpa'"):
        mllama("gap_triton")


def test_cross_attention_by_attach() -> None:
    with pytest.raises(ValueError, match=r"can't prune Mllama.* cross-attention"):
        gap_triton.attach(mllama("sdpa"))


def test_models_that_read_every_row() -> None:
    """A vector for each token (ColPali and kin), or a class."""
    config = transformers.ColPaliConfig(vlm_config=build("llava").config.to_dict())
    model = transformers.ColPaliForRetrieval(config)
    message = r"makes an output of every token's last hidden state, and dropped tokens have none"
    with pytest.raises(ValueError, match=f"ColPaliForRetrieval {message}"):
        gap_triton.attach(model)
    gap_triton.attach(model.vlm)
    tokens = transformers.LlamaForTokenClassification(build("llava").config.text_config)
    with pytest.raises(ValueError, match=f"LlamaForTokenClassification {message}"):
        gap_triton.attach(tokens)
    gap_triton.attach(transformers.LlamaForSequenceClassification(build("llava").config.text_config))


def test_a_decoder_alone_that_is_not_checked() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9))
    with pytest.raises(
        ValueError,
        match=r"found no vision-language decoder in GPT2LMHeadModel.* or a decoder alone",
    ):
        gap_triton.attach(model)


def test_not_a_model() -> None:
    with pytest.raises(ValueError, match=r"model=Linear: expected a transformers PreTrainedModel"):
        gap_triton.attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("layer", [LAYERS - 1, LAYERS, 99])
def test_layer_outside_the_model(layer: int) -> None:
    message = (
        rf"GapConfig.layer={layer}: this model's decoder has {LAYERS} layers; expected -1 to {LAYERS - 2}"
    )
    with pytest.raises(ValueError, match=message):
        gap_triton.attach(build("llava", "sdpa"), GapConfig(layer=layer))
    with pytest.raises(ValueError, match=message):
        gap_triton.configure(build("llava", "gap_triton"), GapConfig(layer=layer))


def test_a_decoder_of_one_layer() -> None:
    config = transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    with pytest.raises(
        ValueError,
        match=r"GapConfig.layer=0: this model's decoder has 1 layer; expected -1, before the decoder, so that at least one "
        "layer follows",
    ):
        gap_triton.attach(model, GapConfig(layer=0))
    gap_triton.attach(model, GapConfig(layer=-1, score="random"))


def test_config_of_the_wrong_type() -> None:
    with pytest.raises(ValueError, match=r"config=\{'keep': 0.5\}: expected a gap_triton.GapConfig"):
        gap_triton.attach(build("llava", "sdpa"), {"keep": 0.5})


@pytest.mark.parametrize("chunk", [8, 16, 45])
def test_chunked_prefill(chunk: int) -> None:
    model = build("llava", "gap_triton")
    gap_triton.configure(model, GapConfig(keep=0.5, layer=1))
    message = r"(?i)chunked prefill.*prefill_chunk_size=None"
    if Version(transformers.__version__) < Version("5"):
        message += "|features and image tokens do not match"  # transformers 4 can't split an image itself
    with pytest.raises(ValueError, match=message):
        generate(model, make_prompt("llava", "even"), prefill_chunk_size=chunk)


def test_a_batch_that_is_changed_by_hand_on_a_pruned_cache() -> None:
    model = build("llava", "gap_triton")
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**make_prompt("llava", "even"), past_key_values=cache)
        for layer in cache.layers:
            layer.batch_repeat_interleave(2)
        with pytest.raises(
            ValueError,
            match=r"pruned for a batch of 2 and is continued with a batch of 4: .*batch_repeat_int",
        ):
            model(input_ids=torch.full((4, 1), 7), past_key_values=cache)


def test_another_turn_with_another_layer() -> None:
    model = build("llava", "gap_triton")
    gap_triton.configure(model, GapConfig(keep=0.5, layer=1))
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    first = prompt("llava")
    output = generate(model, first, tokens=3, past_key_values=cache)
    gap_triton.configure(model, GapConfig(keep=0.5, layer=2))
    second = prompt("llava", seed=2, padding="right")
    ids = torch.cat([output.sequences, second["input_ids"]], 1)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
    with pytest.raises(
        ValueError, match=r"GapConfig prunes at layers 2, but this cache was pruned at layers 1"
    ):
        generate(model, inputs, tokens=2, past_key_values=cache)


def test_another_turn_with_another_id_rule() -> None:
    model = build("llava", "gap_triton")
    gap_triton.configure(model, GapConfig(keep=0.5, layer=1, ids="compacted"))
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    output = generate(model, prompt("llava"), tokens=3, past_key_values=cache)
    gap_triton.configure(model, GapConfig(keep=0.5, layer=1))
    second = prompt("llava", seed=2, padding="right")
    ids = torch.cat([output.sequences, second["input_ids"]], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": second["pixel_values"],
    }
    with pytest.raises(ValueError, match=r"GapConfig.ids='kept', but this cache was pruned with 'compacted'"):
        generate(model, inputs, tokens=2, past_key_values=cache)


def test_a_pruned_cache_in_a_model_that_does_not_prune() -> None:
    model = build("llava", "gap_triton")
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**make_prompt("llava", "even"), past_key_values=cache)
        model.train()
        with pytest.raises(
            ValueError, match=f"{CACHE} was pruned, and goes on in a model that does not prune now"
        ):
            model(input_ids=torch.full((2, 1), 7), past_key_values=cache)
        model.eval()
        with pytest.raises(ValueError, match="a call of the decoder by itself"):
            model.model.language_model(input_ids=torch.full((2, 1), 7), past_key_values=cache)


def test_a_cache_that_is_cropped_by_hand() -> None:
    model = build("llava", "gap_triton")
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**make_prompt("llava", "even"), past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :-3], layer.values[:, :, :-3]
        with pytest.raises(
            ValueError,
            match=r"changed behind its own methods after it was pruned: layer 3 \d+ tokens are.* 46 .*crop\(",
        ):
            model(input_ids=torch.full((2, 1), 7), past_key_values=cache)


def test_a_refused_name_is_not_left_behind() -> None:
    model = mllama("sdpa")
    with pytest.raises(ValueError, match="cross-attention"):
        model.set_attn_implementation("gap_triton")
    assert model.config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_attention_sinks() -> None:
    module = torch.nn.Module()
    tensors = torch.zeros(3, 1, 1, 2, 4)
    with pytest.raises(
        ValueError, match="Module needs attention sinks: load the model with attn_implementation='eager'"
    ):
        attention.gap_attention_forward(module, *tensors, None, s_aux=torch.zeros(1))


@pytest.mark.parametrize("package", ["torch", "transformers", "triton"])
def test_versions_too_old(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _requirements.version
    monkeypatch.setattr(_requirements, "version", lambda name: "1.0" if name == package else real(name))
    with pytest.raises(ImportError, match=rf"gap-triton needs {package} >= .*, found 1.0: pip install -U"):
        _requirements.check_versions()


def test_python_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_requirements.sys, "version_info", (3, 9, 0))
    with pytest.raises(ImportError, match=r"gap-triton needs Python 3.10 to 3.13, found 3.9"):
        _requirements.check_versions()
