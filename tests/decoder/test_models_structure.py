"""What decides whether a model that nobody has named runs: its structure, looked at when it is attached or when it runs."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from support import ways
from support.hooks import hooks
from support.installed_types import build_or_skip
from support.oracle import core_of
from support.own_attention import OwnAttention
from support.prompts import make_prompt
from support.tiny import IMAGE, TEXT, VISION, build, generate
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llava import modeling_llava

import gap_triton
from gap_triton import GapConfig, _requirements
from gap_triton.integration import attention
from gap_triton.integration import supported_models as models
from gap_triton.latency import count
from gap_triton.later_layers.masks import causal_mask
from gap_triton.prefill import prompt, unrotated
from gap_triton.prefill.prompt import looks_ahead
from gap_triton_cli.overlay import check_overlay


def test_a_type_that_nobody_has_named_runs_if_its_structure_is_safe() -> None:
    model, inputs = build("llava", "sdpa"), make_prompt("llava", "left-padded")
    with gap_triton.pruning(model, GapConfig(keep=0.4, layer=1)):
        expected = generate(model, inputs)
    for config in (model.config, model.config.text_config, model.model.language_model.config):
        config.__class__ = type(config.__class__.__name__, (config.__class__,), {"model_type": "someday"})
    with gap_triton.pruning(model, GapConfig(keep=0.4, layer=1)):
        output = generate(model, inputs)
        assert gap_triton.last_selection(model).visual_index.shape[1] == 15
    assert torch.equal(output.sequences, expected.sequences)


class ExtraArgumentLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, token_weights=None, **kwargs):
        return super().forward(hidden_states, **kwargs)


class DeafLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None):
        return super().forward(hidden_states, attention_mask, position_ids)


class RememberingMlp(modeling_llama.LlamaMLP):
    def forward(self, x, past_key_values=None):
        return super().forward(x)


class AsksForEager(modeling_llama.LlamaAttention):
    def is_eager(self):
        return self.config._attn_implementation == "eager"


class AsksForSdpa(modeling_llama.LlamaAttention):
    def is_sdpa(self):
        return self.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "reason"), [(AsksForEager, None), (AsksForSdpa, "AsksForSdpa attends in another way")]
)
def test_asking_for_eager_alone_is_no_attention_of_its_own(kind: type[nn.Module], reason: str | None) -> None:
    """In transformers 4.57 every attention asks for that, and calls the interface under any other name."""
    text = build("llava", "sdpa").model.language_model
    text.layers[0].self_attn.__class__ = kind
    found = models.why_own_attention(text)
    assert found is None if reason is None else (found or "").startswith(reason)


class DeafOwner(modeling_llava.LlavaModel):
    def forward(self, input_ids=None, pixel_values=None, attention_mask=None):
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)


class SilentOwner(modeling_llava.LlavaModel):
    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)


class SilentDecoder(modeling_llama.LlamaModel):
    def forward(
        self, inputs_embeds=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs
    ):
        return super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )


def change(model, what: str) -> None:
    core = model.model
    layer = core.language_model.layers[2]
    if what == "owner":
        core.__class__ = DeafOwner
    elif what == "argument":
        for each in core.language_model.layers:
            each.__class__ = ExtraArgumentLayer
    elif what == "deaf layer":
        for each in core.language_model.layers:
            each.__class__ = DeafLayer
    elif what == "attention":
        layer.self_attn.__class__ = OwnAttention
    elif what == "index":
        layer.self_attn.layer_idx = 0
    elif what == "memory":
        layer.mlp.__class__ = RememberingMlp
    elif what == "convolution":
        layer.smear = nn.Conv1d(64, 64, 3)
    elif what == "shared":
        core.language_model.config.num_kv_shared_layers = 2
    elif what == "kind":
        core.language_model.config.layer_types = ["full_attention", "novel_attention"] * 3
    elif what == "decoder":
        model.expert = modeling_llama.LlamaModel(core.language_model.config)
    else:
        core.config.__dict__["image_token_index"] = None


REASONS = {
    "owner": "DeafOwner.forward takes no further keyword arguments",
    "argument": r"ExtraArgumentLayer.forward takes 'token_weights', which may belong to tokens that get dropped",
    "deaf layer": "DeafLayer.forward takes no further keyword arguments",
    "attention": "one attention module in decoder layer 2 that calls transformers' attention interface, found none",
    "index": "one attention module in decoder layer 2 .* found none",
    "memory": "decoder layer 2 holds a RememberingMlp, which looks at other tokens or remembers them",
    "convolution": "decoder layer 2 holds a Conv1d, which mixes neighbouring tokens",
    "shared": "keys and values of an earlier layer",
    "kind": "decoder layer 1 is 'novel_attention': it is none of those known to be safe",
    "decoder": r"a second decoder, expert \(LlamaModel\), reads what the first one holds",
    "token": "names no image token; expected one of image_token_id",
}


# Of those, the ones whose decoder may still be handed the survivors alone.
BEFORE_THE_DECODER = ("attention", "index", "memory", "convolution", "shared")


@pytest.mark.parametrize("what", REASONS)
def test_a_structure_that_is_not_safe_is_refused(what: str) -> None:
    model = build("llava", "sdpa")
    change(model, what)
    instead = (
        r".* in its decoder: .*Before its decoder it can: use GapConfig\(layer=-1, score='text_similarity'\)"
    )
    for config in (GapConfig(), GapConfig(0.4, 1, "random"), GapConfig(0.4, -1, "random")):
        before = config.layer == -1
        if before and what in BEFORE_THE_DECODER:
            continue
        with pytest.raises(ValueError, match=REASONS[what]) as caught:
            gap_triton.attach(model, config)
        assert bool(re.match(instead, str(caught.value))) == (what in BEFORE_THE_DECODER)
        assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("what", BEFORE_THE_DECODER)
def test_the_default_of_a_model_that_can_be_pruned_before_its_decoder_only(what: str, warnings) -> None:
    model = build("llava", "sdpa")
    change(model, what)
    gap_triton.attach(model)
    assert "before its decoder, by GapConfig(layer=-1, score='text_similarity'), because" in warnings.text
    assert re.search(REASONS[what], warnings.text)
    if what in ("attention", "memory", "convolution"):  # the others only look so, and can't run
        generate(model, make_prompt("llava", "left-padded"), tokens=2)
        assert gap_triton.last_selection(model).visual_index.shape == (2, 18)


@pytest.mark.parametrize("silent", ["owner", "decoder"])
def test_a_module_that_keeps_its_arguments_to_itself(silent: str) -> None:
    """It can't be told by its signature; without a check the model would run unpruned, or half pruned."""
    model, inputs = build("llava", "sdpa"), make_prompt("llava", "even")
    if silent == "owner":
        model.model.__class__ = SilentOwner
    else:
        model.model.language_model.__class__ = SilentDecoder
    gap_triton.attach(model, GapConfig(keep=0.4, layer=1))
    with pytest.raises(
        RuntimeError, match=r"Silent\w+ does not hand its keyword arguments to its .* nothing was dropped"
    ):
        model(**inputs)


def test_positional_arguments_of_a_layer() -> None:
    model, inputs = build("llava", "sdpa"), make_prompt("llava", "even")
    gap_triton.attach(model, GapConfig(keep=0.4, layer=1))
    layer = model.model.language_model.layers[3]

    class CalledByPosition(type(layer)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, torch.zeros(1), **kwargs)

    layer.__class__ = CalledByPosition
    with pytest.raises(
        RuntimeError, match="CalledByPosition was handed 1 positional arguments besides hidden_states"
    ):
        model(**inputs)


class BiasedAttention(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        position_bias = torch.zeros(1)
        interface = modeling_llama.ALL_ATTENTION_FUNCTIONS["sdpa"]
        return interface(self, hidden_states, position_bias=position_bias, **kwargs)


def gemma2(implementation: str = "eager", softcap: float | None = 50.0) -> transformers.PreTrainedModel:
    config = transformers.Gemma2Config(**TEXT, head_dim=16, attn_logit_softcapping=softcap)
    return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation=implementation).eval()


def paligemma2(implementation: str = "eager") -> transformers.PreTrainedModel:
    config = transformers.PaliGemmaConfig(
        text_config=transformers.Gemma2Config(**TEXT, head_dim=16),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_index=IMAGE,
        projection_dim=TEXT["hidden_size"],
    )
    return transformers.PaliGemmaForConditionalGeneration._from_config(
        config, attn_implementation=implementation
    )


def gpt_oss(implementation: str = "eager") -> transformers.PreTrainedModel:
    config = transformers.GptOssConfig(**TEXT, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM._from_config(config, attn_implementation=implementation)


def biased(implementation: str = "sdpa") -> transformers.PreTrainedModel:
    model = build("llava", "sdpa")
    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = BiasedAttention
    if implementation == "gap_triton":
        model.set_attn_implementation(implementation)
    return model


MORE_THAN_DENSE = {
    gemma2: r"Gemma2Attention needs soft-capped attention logits \('softcap'\)",
    paligemma2: r"Gemma2Attention needs soft-capped attention logits \('softcap'\)",
    gpt_oss: r"GptOssAttention needs attention sinks \('s_aux'\)",
    biased: r"BiasedAttention needs a position bias \('position_bias'\)",
}


@pytest.mark.parametrize("way", ["name", "set", "attach", "configure"])
@pytest.mark.parametrize("make", MORE_THAN_DENSE, ids=lambda make: make.__name__)
def test_attention_that_asks_for_more_is_refused_before_it_runs(make, way: str) -> None:
    """Its code names what it asks for, and its attributes say whether it is there."""
    message = (
        rf"{MORE_THAN_DENSE[make]}, and attention is plain dense .* Load it with attn_implementation='eager'"
    )
    if way == "name":
        with pytest.raises(ValueError, match=message):
            make("gap_triton")
        return
    model = make()
    before = model.config._attn_implementation
    function = {
        "set": lambda: model.set_attn_implementation("gap_triton"),
        "attach": lambda: gap_triton.attach(model, GapConfig()),
        "configure": lambda: gap_triton.configure(model, GapConfig()),
    }[way]
    with pytest.raises(ValueError, match=message):
        function()
    assert model.config._attn_implementation == before
    assert hooks(model) == 0


def test_attention_that_could_ask_for_more_and_does_not() -> None:
    """Gemma 2 without the cap that it could have."""
    model, ids = gemma2("eager", None), torch.arange(5, 45)[None]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 3:30] = True
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        gap_triton.attach(model, GapConfig(keep=1.0))
        assert float((model(input_ids=ids, visual_mask=mask).logits - dense).abs().max()) <= 1e-5
        gap_triton.configure(model, GapConfig(keep=0.4, layer=1))
        model(input_ids=ids, visual_mask=mask)
    assert gap_triton.last_selection(model).visual_index.shape == (1, 11)


def test_code_that_can_not_be_read() -> None:
    """Then the attention function says so when it is called, as below."""
    namespace: dict[str, object] = {}
    exec("def forward(self, x, **kwargs):\n    return call(self, softcap=self.cap)", namespace)
    assert models._keywords_given(namespace["forward"]) == ()


@pytest.mark.parametrize("keyword", ["s_aux", "sinks", "softcap", "position_bias"])
def test_attention_that_is_more_than_dense(keyword: str) -> None:
    tensors = torch.zeros(3, 1, 1, 2, 4)
    with pytest.raises(
        ValueError, match=r"is plain dense attention, and Module needs .*attn_implementation='eager'"
    ):
        attention.gap_attention_forward(nn.Module(), *tensors, None, **{keyword: torch.ones(1)})


def test_a_tensor_handed_through_to_a_layer_is_cut_to_the_survivors() -> None:
    """Undeclared keyword arguments with one entry per token follow the tokens; others stay."""
    model, inputs = build("llava", "sdpa"), make_prompt("llava", "even")
    rows = torch.arange(inputs["input_ids"].shape[1])[None]
    other = torch.zeros(2, 3)
    seen = {}
    model.model.language_model.layers[3].self_attn.register_forward_pre_hook(
        lambda m, a, k: seen.update(k), with_kwargs=True
    )
    gap_triton.attach(model, GapConfig(keep=0.4, layer=1))
    with torch.no_grad():
        model(**inputs, row_of_token=rows, something_else=other)
    assert torch.equal(seen["row_of_token"], gap_triton.last_selection(model).index)
    assert seen["something_else"] is other


@pytest.mark.parametrize("ids", ["compacted", "permuted", "reordered", "stretched"])
def test_renumbering_is_refused_where_it_is_not_defined(ids: str) -> None:
    model = build_or_skip("gemma3")
    message = rf"GapConfig.ids='{ids}': .* has one by layer type; use ids='kept'"
    with pytest.raises(ValueError, match=message):
        gap_triton.attach(model, GapConfig(keep=0.4, layer=1, ids=ids))
    gap_triton.attach(model)
    with pytest.raises(ValueError, match=message):
        gap_triton.configure(model, GapConfig(keep=0.4, layer=1, ids=ids))


def test_looks_ahead() -> None:
    causal = torch.ones(4, 7, dtype=torch.bool).tril(3)[None, None]
    right = torch.tensor([[True, True, False, False]])
    padded = causal & torch.tensor([True] * 5 + [False] * 2)  # columns
    both_ways = causal.clone()
    both_ways[..., 1, 5] = True
    additive = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    assert not looks_ahead(None, None)
    assert not looks_ahead(causal[0, 0], None)
    assert not looks_ahead(causal, None)
    assert not looks_ahead(additive, None)
    assert not looks_ahead({"full_attention": causal, "sliding_attention": None}, None)
    assert not looks_ahead(padded, right)
    assert looks_ahead(padded, None)
    assert looks_ahead(both_ways, None)
    assert looks_ahead(torch.where(both_ways, 0.0, -1e30), None)
    assert looks_ahead({"full_attention": causal, "sliding_attention": both_ways}, None)
    assert looks_ahead(torch.ones(1, 1, 4, 7, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool))


def test_a_mask_that_is_known_to_be_plain_is_not_read() -> None:
    positions = torch.arange(9)[None]
    for window in (None, 4):
        mask = causal_mask(positions, positions, window)
        unmarked = mask.clone()
        assert count(lambda mask=mask: looks_ahead(mask, None), torch.device("cpu")).launches == 0
        assert count(lambda mask=unmarked: looks_ahead(mask, None), torch.device("cpu")).reads == 1


def test_a_large_mask_is_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    both_ways = causal.clone()
    both_ways[1, 0, 20, 30] = True
    whole = [looks_ahead(mask, None) for mask in (causal, both_ways)]
    monkeypatch.setattr(prompt, "BLOCK", 7 * 80)
    assert [looks_ahead(mask, None) for mask in (causal, both_ways)] == whole == [False, True]


def test_another_turn_in_which_tokens_see_later_ones() -> None:
    """A mask of the model that is not causal, on a cache that was pruned: later layers could only be given a causal one."""
    model, inputs = build("llava", "sdpa"), make_prompt("llava", "left-padded")
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    past = inputs["input_ids"].shape[1] + 1

    def look_both_ways(module, args, kwargs):
        return args, {**kwargs, "attention_mask": torch.ones(2, 1, 4, past + 4, dtype=torch.bool)}

    gap_triton.attach(model, GapConfig(keep=0.4, layer=1))
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        model(input_ids=torch.full((2, 1), 7), attention_mask=mask[:, :past], past_key_values=cache)
        gap_triton.detach(model)
        model.model.language_model.register_forward_pre_hook(look_both_ways, with_kwargs=True)
        gap_triton.attach(model, GapConfig(keep=0.4, layer=1))
        with pytest.raises(ValueError, match="this model lets prompt tokens see later ones"):
            model(input_ids=torch.full((2, 4), 8), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("name", ways.MODELS)
def test_a_model_that_counts_by_a_cache_pruned_before_the_decoder(name: str) -> None:
    """The cache answers as if unpruned, so the model's own ids are those that generate() gives."""
    if name == ways.MROPE and not ways.V5:
        pytest.skip("this transformers counts from 0 where it is told no positions, pruned or not")
    model, inputs = ways.build(name, "gap_triton"), ways.make(name, "even")
    gap_triton.configure(model, GapConfig(keep=0.4, layer=-1, score="random"))
    answer = generate(model, inputs, tokens=3)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
        for step in (1, 2):
            token = answer.sequences[:, step - 4 : step - 3]
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            assert float((logits - answer.logits[step]).abs().max()) <= 1e-4


def test_a_released_decoder_of_another_kind_inside_a_known_owner() -> None:
    """The decoder decides, not the type of the model around it: LLaVA with layers that slide in chunks, say."""
    model = build("llava/qwen2", "sdpa")
    text = core_of(model)[1]
    text.config.layer_types = ["full_attention"] * 4 + ["chunked_attention"]
    with pytest.raises(ValueError, match=r"decoder layer 4 is 'chunked_attention': it attends in chunks"):
        gap_triton.attach(model, GapConfig())


def test_a_rotation_that_has_no_name_is_refused_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known from the code of the layer that scores, so before any forward."""
    monkeypatch.setattr(unrotated, "ROTATIONS", ("spin",))
    model, config = build("llava", "gap_triton"), GapConfig(keep=0.4, layer=1, score="unrotated")
    for function in (gap_triton.attach, gap_triton.configure):
        with pytest.raises(
            ValueError,
            match=r"score='unrotated': LlamaAttention does not rotate .* by spin with one cos and sin",
        ):
            function(model, config)


class Remote(modeling_llava.LlavaPreTrainedModel):
    """Laid out as InternVL's own code: the decoder with its head, and a forward that merges by itself."""

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = transformers.CLIPVisionModel(config.vision_config)
        self.mlp1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = transformers.LlamaForCausalLM(config.text_config)

    def forward(self, pixel_values, input_ids=None, attention_mask=None, labels=None):
        embeds = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask)


def test_remote_code_around_a_decoder_that_can_be_pruned() -> None:
    model = Remote(build("llava", "sdpa").config).eval()
    with pytest.raises(
        ValueError,
        match=r"Remote.forward takes no further keyword arguments.* Its decoder can be pruned by itself: "
        r"gap_triton.attach\(model.language_model, config\), and hand visual_mask, a \[B, Q\] bool tensor",
    ):
        gap_triton.attach(model)
    gap_triton.attach(model.language_model, GapConfig(keep=0.4, layer=1))
    ids = make_prompt("llava", "even")["input_ids"]
    embeds = model.language_model.get_input_embeddings()(ids).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids), "visual_mask": ids == IMAGE}
    generate(model.language_model, inputs, tokens=2)
    assert gap_triton.last_selection(model.language_model).visual_index.shape == (2, 15)
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert hooks(model.language_model) > 0


def test_a_model_without_an_image_token_names_its_decoder_too() -> None:
    model = build("llava", "sdpa")
    model.model.config.__dict__["image_token_index"] = None
    message = r"names no image token; .* by itself: gap_triton.attach\(model.model.language_model, config\)"
    with pytest.raises(ValueError, match=message):
        gap_triton.attach(model)


@pytest.mark.parametrize(
    ("installed", "newer"), [("5.24.7", False), ("5.25.0.dev0", True), ("6.0", True), ("4.57.6", False)]
)
def test_refusals_under_a_transformers_that_nobody_has_tested(
    installed: str, newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_requirements, "version", lambda package: installed)
    model = build("llava", "sdpa")
    change(model, "owner")
    hint = rf" \(transformers {installed} is newer than 5.24, the newest tested\)" if newer else ""
    for refused in (
        model,
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)),
    ):
        with pytest.raises(ValueError, match=rf"attn_implementation='sdpa' to run it unpruned{hint}\.$"):
            gap_triton.attach(refused)


def test_an_overlay_of_tokens_that_are_no_square_grid() -> None:
    check_overlay(build("llava_next", "sdpa").config)
    with pytest.raises(ValueError, match=r"overlay: .* .* model_type='qwen2_5_vl'; leave the overlay out"):
        check_overlay(build_or_skip("qwen2_5_vl").config)
