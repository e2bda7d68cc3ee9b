"""Modules that are replaced after pruning was attached: followed, or noticed in a sentence that says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support.comparison import same
from support.hooks import attributes, hooks
from support.own_attention import OwnAttention
from support.prompts import make_prompt
from support.tiny import LAYERS, build, config_of, generate
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import gap_triton
from gap_triton import GapConfig

CONFIG = GapConfig(keep=0.4, layer=1)
NUWA = GapConfig(keep=0.4, layer=-1, score="cls", coverage="region", merge="aggregation")


def model_with(config: GapConfig = CONFIG) -> transformers.PreTrainedModel:
    model = build("llava", "gap_triton")
    gap_triton.configure(model, config)
    return model


def plain() -> transformers.PreTrainedModel:
    model = build("llava", "sdpa")
    generate(model, make_prompt("llava", "left-padded"), tokens=1)  # transformers puts hooks of its own on it
    return model


def expected(config: GapConfig = CONFIG, **options: object):
    return generate(model_with(config), make_prompt("llava", "left-padded"), **options)


def fresh(layer: LlamaDecoderLayer, config: transformers.PreTrainedConfig, index: int) -> LlamaDecoderLayer:
    new = LlamaDecoderLayer(config, index)
    new.load_state_dict(layer.state_dict())
    return new.eval()


def again(model: torch.nn.Module, how: str, config: GapConfig = CONFIG) -> None:
    if how == "configure":
        gap_triton.configure(model, config)
    elif how == "attach":
        gap_triton.attach(model, config)
    elif how == "name":
        model.set_attn_implementation("gap_triton")
    elif how == "off and on":
        model.set_attn_implementation("sdpa")
        assert hooks(model) == 0
        model.set_attn_implementation("gap_triton")
        gap_triton.configure(model, config)


@pytest.mark.parametrize("how", ["not at all", "configure", "attach", "name", "off and on"])
@pytest.mark.parametrize("index", range(LAYERS))
def test_a_layer(index: int, how: str) -> None:
    model, inputs = model_with(), make_prompt("llava", "left-padded")
    layers = model.model.language_model.layers
    old, layers[index] = layers[index], fresh(layers[index], model.config.text_config, index)
    again(model, how)
    assert same(generate(model, inputs), expected())
    assert hooks(old) == 0
    gap_triton.detach(model)
    assert hooks(model) == 0


def test_a_layer_between_prefill_and_decoding() -> None:
    model, inputs = model_with(), make_prompt("llava", "left-padded")
    layers = model.model.language_model.layers
    steps = []

    def stream(*_: object) -> None:
        steps.append(1)
        if len(steps) == 2:
            layers[3] = fresh(layers[3], model.config.text_config, 3)

    with model.register_forward_pre_hook(stream):
        assert same(generate(model, inputs), expected())


@pytest.mark.parametrize("how", ["not at all", "configure"])
def test_another_number_of_layers(how: str) -> None:
    """The last layer taken off, and one put behind the last."""
    inputs = make_prompt("llava", "left-padded")
    for change in ("fewer", "more"):
        outputs = []
        for attached_first in (True, False):
            model = build("llava", "gap_triton" if attached_first else "sdpa")
            if attached_first:
                gap_triton.configure(model, CONFIG)
            text = model.model.language_model
            if change == "fewer":
                del text.layers[-1]
            else:
                text.layers.append(fresh(text.layers[0], model.config.text_config, LAYERS))
            text.config.num_hidden_layers = len(text.layers)
            if attached_first:
                again(model, how)
            else:
                gap_triton.attach(model, CONFIG)
            outputs.append(generate(model, inputs))
        assert same(*outputs)


def test_a_layer_that_is_not_safe() -> None:
    model, inputs = model_with(), make_prompt("llava", "left-padded")
    layers = model.model.language_model.layers
    layers[3] = fresh(layers[3], model.config.text_config, 3)
    layers[3].self_attn.__class__ = OwnAttention
    message = (
        "one attention module in decoder layer 3 that calls transformers' attention interface, found none"
    )
    for run in (
        lambda: generate(model, inputs),
        lambda: again(model, "configure"),
        lambda: again(model, "attach"),
    ):
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("how", ["configure", "attach", "name"])
@pytest.mark.parametrize("what", ["decoder", "owner"])
def test_a_decoder_or_what_is_around_it(what: str, how: str) -> None:
    model, inputs = model_with(), make_prompt("llava", "left-padded")
    if what == "decoder":
        old = model.model.language_model
        model.model.language_model = transformers.LlamaModel(model.config.text_config).eval()
        model.model.language_model.load_state_dict(old.state_dict())
        sentence = "the decoder of LlavaModel was replaced after gap_triton was attached, so nothing was dropped: call"
    else:
        old = model.model
        model.model = transformers.LlavaModel(model.config).eval()
        model.model.load_state_dict(old.state_dict())
        sentence = "model of LlavaForConditionalGeneration was replaced after gap_triton was attached: call"
    with pytest.raises(RuntimeError, match=sentence):
        generate(model, inputs)
    again(model, how)
    assert same(generate(model, inputs), expected())
    assert hooks(old) == 0
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert attributes(model) == attributes(plain())


def test_a_decoder_under_another_implementation() -> None:
    """It was never given the name, so `configure` says so, and `attach` gives it, and takes it back."""
    model, inputs = build("llava", "sdpa"), make_prompt("llava", "left-padded")
    gap_triton.attach(model, CONFIG)
    weights = model.model.language_model.state_dict()
    model.model.language_model = transformers.LlamaModel._from_config(
        config_of("llava").text_config, attn_implementation="eager"
    ).eval()
    model.model.language_model.load_state_dict(weights)
    with pytest.raises(ValueError, match='does not run under "gap_triton"'):
        gap_triton.configure(model, CONFIG)
    gap_triton.attach(model, CONFIG)
    assert same(generate(model, inputs), expected())
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert model.model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("what", ["tower", "a layer of the tower", "its scoring attention", "projector"])
@pytest.mark.parametrize("how", ["configure", "attach"])
def test_the_vision_encoder(what: str, how: str) -> None:
    model, inputs = model_with(NUWA), make_prompt("llava", "left-padded")
    core, before = model.model, attributes(plain())
    if what == "tower":
        core.vision_tower = copy.deepcopy(build("llava", "gap_triton").model.vision_tower)
    elif what == "a layer of the tower":
        layers = core.vision_tower.encoder.layers if hasattr(core.vision_tower, "encoder") else None
        layers = core.vision_tower.vision_model.encoder.layers if layers is None else layers
        layers[-1] = _twin(model, layers[-1])
    elif what == "its scoring attention":
        layer = gap_triton.vision_tower.find_tower(core).layers[-1]
        layer.self_attn = _twin(model, layer.self_attn)
    else:
        core.multi_modal_projector = _twin(model, core.multi_modal_projector)
    with pytest.raises(
        ValueError, match="vision tower of LlavaModel, or a part of it, was replaced after the model was"
    ):
        generate(model, inputs)
    again(model, how, NUWA)
    assert same(generate(model, inputs), expected(NUWA))
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert attributes(model) == before


def _twin(model: torch.nn.Module, module: torch.nn.Module) -> torch.nn.Module:
    """``module`` of a model that was never attached."""
    (name,) = [name for name, each in model.named_modules() if each is module]
    return build("llava", "gap_triton").get_submodule(name)


def test_another_head_around_the_same_modules() -> None:
    """The new one tells about drafts and labels as the old one does."""
    model, inputs = model_with(), make_prompt("llava", "even")
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    other = transformers.LlavaForConditionalGeneration._from_config(
        config_of("llava"), attn_implementation="sdpa"
    ).eval()
    other.model, other.lm_head = model.model, model.lm_head
    for how in ("attach", "configure"):
        again(other, how)
        for head in (model, other):
            assert same(generate(head, make_prompt("llava", "left-padded")), expected())
            with (
                pytest.raises(ValueError, match=r"labels\[0, \d+\] is to be predicted from row"),
                torch.no_grad(),
            ):
                head(**inputs, labels=labels)
    gap_triton.detach(other)
    assert hooks(model) == 0


def test_a_copy_of_a_part() -> None:
    """The decoder alone of an attached model, copied, is one of its own, which can be told by a mask."""
    model = model_with()
    twin = copy.deepcopy(model.model.language_model)
    ids = torch.arange(5, 5 + 30)[None]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 4:24] = True
    gap_triton.configure(twin, GapConfig(keep=3, layer=1))
    with torch.no_grad():
        twin(input_ids=ids, visual_mask=mask)
    assert gap_triton.last_selection(twin).visual_index.shape == (1, 3)
    assert gap_triton.last_selection(model) is None
    assert same(generate(model, make_prompt("llava", "left-padded")), expected())
