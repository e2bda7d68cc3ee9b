"""A run that could prune and does not says so, once; what was asked for and can't be had is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import families
from support.comparison import same
from support.hooks import hooks
from support.lone import merged, without
from support.prompts import make_prompt
from support.tiny import IMAGE, build, config_of, generate
from support.ways import V5
from torch import nn
from transformers.models.llava import modeling_llava

import gap_triton
from gap_triton import GapConfig
from gap_triton.integration import unpruned

CONFIG = GapConfig(keep=0.4, layer=1)
MERGED = "LlavaModel got inputs_embeds without input_ids, and no row of them is the embedding of an image placeholder"


def model_with(config: GapConfig = CONFIG) -> transformers.PreTrainedModel:
    model = build("llava/llama", "gap_triton")
    gap_triton.configure(model, config)
    return model


@pytest.mark.parametrize("way", ["forward", "generate", "generate with ids"])
def test_merged_embeddings(way: str, warnings: pytest.LogCaptureFixture) -> None:
    prompt = make_prompt("llava", "left-padded")
    model, inputs = model_with(), without(merged("llama", prompt), "visual_mask")
    for _ in range(2):
        if way == "forward":
            with torch.no_grad():
                model(**inputs)
        else:
            more = {"input_ids": prompt["input_ids"]} if way == "generate with ids" else {}
            generate(model, inputs | more, tokens=2)
    assert gap_triton.last_selection(model) is None
    assert warnings.text.count(MERGED) == 1
    assert "pass visual_mask, a [B, Q] bool tensor" in warnings.text


@pytest.mark.parametrize("what", ["placeholders", "mask", "ids", "text", "nothing to drop"])
def test_runs_of_which_nothing_is_said(what: str, warnings: pytest.LogCaptureFixture) -> None:
    prompt = make_prompt("llava", "left-padded")
    model, inputs = model_with(), merged("llama", prompt)
    if what == "placeholders":  # not filled in yet: pixel values come along
        inputs = without(prompt, "input_ids")
        inputs["inputs_embeds"] = model.get_input_embeddings()(prompt["input_ids"]).detach()
    elif what == "ids":
        inputs = prompt
    elif what == "text":
        inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    elif what == "nothing to drop":
        gap_triton.configure(model, GapConfig(keep=1.0))
    generate(model, inputs, tokens=2)
    assert "gap_triton" not in warnings.text


def test_a_text_prompt_as_embeddings_is_told_the_truth(warnings: pytest.LogCaptureFixture) -> None:
    """Nobody can tell it from a merged prompt, so what is said holds for both."""
    model = model_with()
    embeds = model.get_input_embeddings()(torch.tensor([[1, 5, 6, 7]])).detach()
    generate(model, {"inputs_embeds": embeds, "attention_mask": torch.ones(1, 4)}, tokens=2)
    assert warnings.text.count("If image features are merged into them already, pass visual_mask") == 1


def test_a_decoder_called_past_its_owner(warnings: pytest.LogCaptureFixture) -> None:
    """By a mask it prunes as the whole does; without one nothing tells it of images."""
    prompt = make_prompt("llava", "left-padded")
    model, inputs = model_with(), merged("llama", prompt)
    text = model.model.language_model
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state
        kept = gap_triton.last_selection(model).index
        found = text(**inputs).last_hidden_state
        assert torch.equal(found, states)
        assert torch.equal(gap_triton.last_selection(model).index, kept)
        assert not warnings.text
        text(**without(inputs, "visual_mask"))
        text(**without(inputs, "visual_mask"))
    assert (
        warnings.text.count("LlamaModel was called by itself, past LlavaModel, which tells gap_triton where")
        == 1
    )


@pytest.mark.parametrize("how", ["prunes", "trains", "one token", "fails"])
def test_a_decoder_called_past_its_owner_holds_nothing_back(how: str) -> None:
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    model = model_with()
    text = model.model.language_model
    if how == "trains":
        text.train()
    elif how == "one token":
        inputs = {"input_ids": torch.full((2, 1), 7), "visual_mask": torch.zeros(2, 1, dtype=torch.bool)}
    with torch.no_grad():
        if how == "fails":
            paged = type("PagedAttentionCache", (transformers.DynamicCache,), {})()
            with pytest.raises(ValueError, match="a PagedAttentionCache holds"):
                text(**inputs, past_key_values=paged)
            cache = transformers.DynamicCache(config=text.config)
            text(**inputs, past_key_values=cache)
            inputs["attention_mask"] = torch.ones(2, 2 * inputs["inputs_embeds"].shape[1])
            with pytest.raises(ValueError, match=r"(?i)chunked prefill|prefill"):
                text(**inputs, past_key_values=cache)
        else:
            text(**inputs)
    assert not model.model.language_model.__dict__["_gap_attachment"].running
    gap_triton.detach(model)
    assert hooks(model) == 0


def test_a_retrieval_model() -> None:
    """It makes a vector of every token."""
    config = transformers.ColQwen2Config(vlm_config=families.config_of("qwen2_vl"), embedding_dim=16)
    with pytest.raises(ValueError, match="ColQwen2ForRetrieval makes an output of every token's last hidden"):
        transformers.ColQwen2ForRetrieval._from_config(config, attn_implementation="gap_triton")


def test_a_decoder_with_another_head_than_the_language_head() -> None:
    """It is a whole model, so the name attaches it, as it does one that generates."""
    config = config_of("llava").text_config
    config.num_labels = 3
    model = transformers.LlamaForSequenceClassification._from_config(
        config, attn_implementation="gap_triton"
    ).eval()
    gap_triton.configure(model, CONFIG)
    inputs = merged("llama", make_prompt("llava", "left-padded"))
    with torch.no_grad():
        logits = model(**inputs).logits
        assert gap_triton.last_selection(model).visual_index.shape == (2, 15)
        states = model.model(**inputs).last_hidden_state[:, -1]
        assert torch.allclose(logits, model.score(states), atol=1e-6)  # of all rows at once there
    model.set_attn_implementation("sdpa")
    assert hooks(model) == 0


def test_a_name_that_was_set_is_not_asked_for() -> None:
    model = build("llava", "gap_triton")
    gap_triton.detach(model)
    with pytest.raises(
        ValueError, match=r'runs under "gap_triton", but nothing is attached to it: use gap_triton.attach'
    ):
        gap_triton.configure(model, CONFIG)
    gap_triton.attach(model, CONFIG)
    gap_triton.configure(model, CONFIG)


def test_a_decoder_that_was_switched_past_the_methods(warnings: pytest.LogCaptureFixture) -> None:
    """Assigning to the config is noticed by nobody but the forward."""
    model, inputs = model_with(), make_prompt("llava", "left-padded")
    model.model.language_model.config._attn_implementation = "sdpa"
    assert same(generate(model, inputs), generate(build("llava/llama", "sdpa"), inputs))
    assert (
        warnings.text.count("attached to LlavaModel, whose decoder runs under 'sdpa', so nothing is pruned")
        == 1
    )


class Classifier(modeling_llava.LlavaPreTrainedModel):
    """A head whose forward lists its arguments."""

    def __init__(self, config: transformers.LlavaConfig) -> None:
        super().__init__(config)
        self.model = transformers.LlavaModel(config)
        self.score = nn.Linear(config.text_config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, labels=None, logits_to_keep=0):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return self.score(output.last_hidden_state[:, -1])


class QuietClassifier(Classifier):
    """A head that takes more, and keeps it to itself."""

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, **kwargs):
        return super().forward(input_ids, attention_mask, pixel_values)


@pytest.mark.parametrize("by_name", [True, False], ids=["name", "attach"])
@pytest.mark.parametrize("kind", [Classifier, QuietClassifier])
def test_a_head_that_tells_its_owner_nothing(
    kind: type[Classifier],
    by_name: bool,
    warnings: pytest.LogCaptureFixture,
) -> None:
    """It runs, since nothing needs to be told; labels of every token, drafts and a mask would be lost on the way."""
    inputs = make_prompt("llava", "left-padded")
    model = kind._from_config(
        config_of("llava"), attn_implementation="gap_triton" if by_name else "sdpa"
    ).eval()
    with torch.no_grad():
        if by_name:
            gap_triton.configure(model, CONFIG)
        else:
            dense = model(**inputs)
            gap_triton.attach(model, CONFIG)
        found = model(**inputs)
        assert gap_triton.last_selection(model).visual_index.shape == (2, 15)
        states = model.model(**inputs).last_hidden_state[:, -1]
        assert torch.equal(found, model.score(states))
        assert (
            warnings.text.count(
                f"{kind.__name__} gets zeros as the last hidden state of tokens that gap_triton"
            )
            == 1
        )
        for labels in (torch.tensor([1, 2]), torch.ones(2, 3)):  # of the whole input
            assert torch.equal(model(**inputs, labels=labels), found)
        told = {"labels": inputs["input_ids"], "logits_to_keep": 3}
        if kind is QuietClassifier:
            told["visual_mask"] = inputs["input_ids"] == IMAGE
        for name, value in told.items():
            with pytest.raises(
                RuntimeError,
                match=f"{kind.__name__} does not hand further keyword arguments on to LlavaModel, which must know {name} to",
            ):
                model(**inputs, **{name: value})
        model.train()
        model(**inputs, labels=inputs["input_ids"])
        model.eval()
        gap_triton.detach(model)
        if not by_name:
            assert torch.equal(model(**inputs), dense)
            assert float((found - dense).abs().max()) > 1e-3


def test_continuous_batching_is_refused() -> None:
    """transformers would refuse the name, or switch to flash attention without a word and lose the configuration."""
    model = model_with()
    message = (
        "continuous batching packs the tokens of several requests into one row, which gap_triton can't prune"
    )
    with pytest.raises(ValueError, match=message):
        model.generate_batch([[1, 5, 6]], max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching()
    gap_triton.detach(model)
    model.set_attn_implementation("sdpa")
    model.init_continuous_batching()


def test_a_cache_of_continuous_batching_is_refused() -> None:
    paged = type("PagedAttentionCache", (), {})()
    with pytest.raises(
        ValueError, match="a PagedAttentionCache holds the tokens of several requests in one row"
    ):
        unpruned.refuse_paged_cache(paged)
    unpruned.refuse_paged_cache(None)
    unpruned.refuse_paged_cache(transformers.DynamicCache())


def test_what_can_be_exported() -> None:
    """A step of decoding and the vision encoder; a prompt only of a model that is not pruned."""
    model, prompt = model_with(), make_prompt("llava", "left-padded")
    whole = {**prompt, "use_cache": False}
    with pytest.raises(ValueError, match=r"torch.export can't take in a prompt of a model that is pruned"):
        torch.export.export(model, (), whole, strict=False)
    token = {"input_ids": torch.full((2, 1), 7), "use_cache": False}
    step = torch.export.export(model, (), token, strict=False)
    with torch.no_grad():
        assert error_of(step.module()(**token), model(**token)) == 0.0
    tower = torch.export.export(model.model.vision_tower, (prompt["pixel_values"],), strict=False)
    assert tower is not None
    gap_triton.detach(model)
    if not V5:
        return  # there transformers itself reads from the prompt
    exported = torch.export.export(model, (), whole, strict=False)
    with torch.no_grad():
        assert error_of(exported.module()(**whole), build("llava/llama", "sdpa")(**whole)) <= 1e-5


def error_of(one: object, other: object) -> float:
    return float((one.logits - other.logits).abs().max())
