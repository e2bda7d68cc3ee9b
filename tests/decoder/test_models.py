"""Every image-text-to-text type of the installed transformers: exact by the oracle, or refused with a reason."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from packaging.version import Version
from support import families, model_types
from support.comparison import TOLERANCE, error
from support.installed_types import build_or_skip
from support.lone import LoneOracle
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle, core_of
from support.survivors import stays_of
from support.tiny import LAYERS, VIDEO, generate

import gap_triton
from gap_triton import GapConfig
from gap_triton.introspect import visual_token_ids

TOKENS = 4


def expected_from(
    model_type: str,
    inputs: dict[str, torch.Tensor],
    config: GapConfig,
    chosen: torch.Tensor | None = None,
    deep=None,
):
    """What the oracle generates, and which rows it dropped."""
    reference = build_or_skip(model_type)
    core_of(reference)[1].set_attn_implementation(ORACLE)
    if deep is not None:
        deep(reference)
    with (
        families.visual_features(reference),
        MaskingOracle(reference, config.layer, config.keep, config.score, chosen) as oracle,
    ):
        return generate(reference, inputs, tokens=TOKENS), oracle.dropped


def pruned_by(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor], config: GapConfig):
    with families.visual_features(model), gap_triton.pruning(model, config):
        output = generate(model, inputs, tokens=TOKENS)
        return output, gap_triton.last_selection(model)


def test_every_type_is_accounted_for() -> None:
    known = {
        *model_types.EXACT,
        *model_types.ALONE,
        *model_types.NOT_PLAIN,
        *model_types.REFUSED,
        *model_types.NOT_BUILT,
    }
    assert not set(families.TYPES) - known
    if Version(transformers.__version__) >= Version(model_types.NEWEST):
        assert known - set(families.TYPES) <= {"pixtral"}


@pytest.mark.parametrize("model_type", model_types.EXACT)
def test_dropping_equals_masking(model_type: str) -> None:
    model = build_or_skip(model_type)
    inputs = families.prompt(model)
    with families.visual_features(model):
        dense = generate(model, inputs, tokens=TOKENS)
    everything, _ = pruned_by(model, inputs, GapConfig(keep=1.0, layer=1))
    assert torch.equal(everything.sequences, dense.sequences)
    assert error(everything, dense) == 0.0
    for layer in (-1, 0, 1, LAYERS - 2):
        config = GapConfig(keep=0.4, layer=layer, score="random" if layer == -1 else "text")
        pruned, selection = pruned_by(model, inputs, config)
        chosen = None
        if layer == -1:
            chosen = inputs["attention_mask"].bool() & ~stays_of(selection, inputs["attention_mask"])
        expected, dropped = expected_from(model_type, inputs, config, chosen)
        assert int(dropped.sum()) >= 20
        assert torch.equal(pruned.sequences, expected.sequences)
        assert error(pruned, expected) <= TOLERANCE
        # Guards the line above: a model that drops nothing, next to an oracle whose mask is ignored, would agree too.
        assert error(pruned, dense) > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", model_types.EXACT)
def test_by_name(model_type: str) -> None:
    """Loaded under the name, vision tower included, a model prunes as it does when it is attached."""
    if model_type in model_types.TEXT_CONFIG_ONLY:
        if model_type in families.TYPES:
            with pytest.raises(KeyError):  # from transformers
                families.build(model_type, "gap_triton")
        named = build_or_skip(model_type, {"text_config": "gap_triton"})
    else:
        named = build_or_skip(model_type, "gap_triton")
    model, config = build_or_skip(model_type), GapConfig(keep=0.4, layer=1)
    layout = None if model_type in model_types.IMAGES_SINCE else model_types.IMAGES.get(model_type)
    inputs = families.prompt(model) if layout is None else families.prompt_with_pixels(model, layout)
    gap_triton.configure(named, config)
    by_name = generate(named, inputs, tokens=TOKENS)
    with gap_triton.pruning(model, config):
        attached = generate(model, inputs, tokens=TOKENS)
    assert torch.equal(by_name.sequences, attached.sequences)
    assert error(by_name, attached) <= TOLERANCE
    assert gap_triton.last_selection(named) is not None


@pytest.mark.parametrize("model_type", model_types.ALONE)
def test_a_decoder_alone_with_a_visual_mask(model_type: str) -> None:
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    reference.model.set_attn_implementation(ORACLE)
    inputs = families.prompt(model)
    visual = inputs.pop("input_ids") == families.IMAGE
    generator = torch.Generator().manual_seed(3)
    inputs["inputs_embeds"] = torch.randn(*visual.shape, families.HIDDEN, generator=generator) * 0.5
    dense = generate(model, inputs, tokens=TOKENS)
    for layer in (0, 1, LAYERS - 2):
        with gap_triton.pruning(model, GapConfig(keep=0.4, layer=layer)):
            pruned = generate(model, inputs | {"visual_mask": visual}, tokens=TOKENS)
        with LoneOracle(reference, layer, 0.4, visual) as oracle:
            expected = generate(reference, inputs, tokens=TOKENS)
        assert oracle.dropped.any()
        assert torch.equal(pruned.sequences, expected.sequences)
        assert error(pruned, expected) <= TOLERANCE
        assert error(pruned, dense) > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", model_types.IMAGES)
def test_images_through_the_vision_tower(model_type: str) -> None:
    since = model_types.IMAGES_SINCE.get(model_type, "0")
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"transformers before {since} calls the vision tower of {model_type} in another way")
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    core_of(reference)[1].set_attn_implementation(ORACLE)
    inputs = families.prompt_with_pixels(model, model_types.IMAGES[model_type])
    dense = generate(model, inputs, tokens=TOKENS)
    for layer in (0, 2):
        config = GapConfig(keep=0.4, layer=layer)
        with gap_triton.pruning(model, config):
            pruned = generate(model, inputs, tokens=TOKENS)
        with MaskingOracle(reference, config.layer, config.keep) as oracle:
            expected = generate(reference, inputs, tokens=TOKENS)
        assert oracle.dropped.any()
        assert torch.equal(pruned.sequences, expected.sequences)
        assert error(pruned, expected) <= TOLERANCE
        assert error(pruned, dense) > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", model_types.EXACT)
def test_text_score_with_padding_on_the_right(model_type: str) -> None:
    """One forward: logits of the rows that stay. Text rows of some models see later ones, or a window."""
    config = GapConfig(keep=0.4, layer=1, score="text")
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    inputs = families.prompt(model, padding="right")
    core_of(reference)[1].set_attn_implementation(ORACLE)
    with torch.no_grad(), families.visual_features(model), families.visual_features(reference):
        with gap_triton.pruning(model, config):
            pruned = model(**inputs).logits
        with MaskingOracle(reference, config.layer, config.keep, config.score) as oracle:
            expected = reference(**inputs).logits
    stays = inputs["attention_mask"].bool() & ~oracle.dropped
    assert oracle.dropped.any()
    assert float((pruned - expected)[stays].abs().max()) <= TOLERANCE


def test_the_list_of_types_with_videos_is_complete() -> None:
    for model_type in model_types.EXACT:
        if model_type in families.TYPES:
            token_ids = visual_token_ids(families.config_of(model_type))
            assert (VIDEO in token_ids) == (model_type in model_types.VIDEOS), model_type


@pytest.mark.parametrize("model_type", model_types.VIDEOS)
def test_video_placeholders(model_type: str) -> None:
    model = build_or_skip(model_type)
    inputs = families.prompt(model, placeholder=VIDEO)
    config = GapConfig(keep=0.4, layer=1)
    pruned, _ = pruned_by(model, inputs, config)
    expected, dropped = expected_from(model_type, inputs, config)
    assert dropped.any()
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE


@pytest.mark.parametrize("model_type", model_types.SEVERAL_AXES)
def test_ids_on_several_axes_are_those_without_pruning(model_type: str) -> None:
    model = build_or_skip(model_type)
    inputs = families.prompt(model)
    text = core_of(model)[1]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    ids: list[torch.Tensor] = []
    hooks = [
        text.layers[-1].register_forward_pre_hook(
            lambda m, a, k: seen.append(k["position_embeddings"]), with_kwargs=True
        ),
        text.register_forward_pre_hook(lambda m, a, k: ids.append(k["position_ids"]), with_kwargs=True),
    ]
    with families.visual_features(model):
        generate(model, inputs, tokens=TOKENS)
    unpruned, seen[:] = list(seen), []
    for hook in hooks:
        hook.remove()
    gap_triton.attach(model, GapConfig(keep=0.4, layer=1))
    handed: list[torch.Tensor | None] = []

    def look(module, args, kwargs):
        seen.append(kwargs["position_embeddings"])
        handed.append(kwargs.get("position_ids"))

    hook = text.layers[-1].register_forward_pre_hook(look, with_kwargs=True)
    with families.visual_features(model):
        generate(model, inputs, tokens=TOKENS)
    hook.remove()
    selection = gap_triton.last_selection(model)
    rows, alive = selection.index.clamp(min=0), selection.index >= 0
    # The ids are three-dimensional indeed: rows and columns of a picture differ.
    axes = ids[0][-3:]
    assert axes.dim() == 3
    assert not torch.equal(axes[1], axes[2])
    for a in range(len(selection.position_ids)):
        assert torch.equal(selection.position_ids[a][alive], ids[0][a].gather(1, rows)[alive].long())
    if handed[0] is not None:  # text ids, or those on several axes
        source = ids[0][-3:] if handed[0].dim() == 3 else ids[0][:1]
        for a, own in enumerate(handed[0].view(-1, *rows.shape)):
            assert torch.equal(own[alive], source[a].gather(1, rows)[alive])
    # cos and sin are [B, Q, D], or [3, B, Q, D] in transformers 4.
    for full, cut in zip(unpruned[0], seen[0], strict=True):
        full, cut = (x.movedim(-3, 0).movedim(-2, 1) for x in (full, cut))  # batch and tokens first
        for b in range(len(rows)):
            assert torch.equal(cut[b][alive[b]], full[b][selection.index[b][alive[b]]])
    for step in range(1, TOKENS):
        assert torch.equal(seen[step][0], unpruned[step][0])


@pytest.mark.parametrize("model_type", model_types.DEEPSTACK)
def test_features_added_behind_layers_on_both_sides(model_type: str) -> None:
    """Qwen3-VL and kin add features of the vision tower behind the first layers: here behind 0, 1 and 2."""

    def deep(model: transformers.PreTrainedModel) -> None:
        text = core_of(model)[1]
        granite = model_type == "granite4_vision"
        visual = families.prompt(model)["input_ids"] == families.IMAGE
        generator = torch.Generator().manual_seed(5)
        features = [torch.randn(int(visual.sum()), families.HIDDEN, generator=generator) for _ in range(3)]

        def add(module, args, kwargs):
            if kwargs["inputs_embeds"].shape[1] == 1:
                return None
            if granite:
                by_layer = {i + 1: value for i, value in enumerate(features)}
                return args, {**kwargs, "vision_mask": visual[..., None], "deepstack_features": by_layer}
            return args, {**kwargs, "visual_pos_masks": visual, "deepstack_visual_embeds": features}

        text.register_forward_pre_hook(add, with_kwargs=True)

    model = build_or_skip(model_type)
    deep(model)
    inputs = families.prompt(model)
    for layer in (0, 1, 2, LAYERS - 2):
        config = GapConfig(keep=0.4, layer=layer)
        pruned, _ = pruned_by(model, inputs, config)
        expected, _ = expected_from(model_type, inputs, config, deep=deep)
        plain, _ = expected_from(model_type, inputs, config)
        assert torch.equal(pruned.sequences, expected.sequences)
        # Features as large as the hidden states make more of rounding; in float64 they agree to a float32.
        assert error(pruned, expected) <= 2 * TOLERANCE
        assert error(plain, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", model_types.SEVERAL_TURNS)
def test_another_turn_with_an_image_on_the_same_cache(model_type: str) -> None:
    config = GapConfig(keep=0.4, layer=1)
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    core_of(reference)[1].set_attn_implementation(ORACLE)
    first = families.prompt(model)
    image = [families.IMAGE] * families.visual_tokens(model_type)
    turns = [[11], [9, *image, 8, 7, 6], [12]]

    def converse(speaker: transformers.PreTrainedModel) -> list[torch.Tensor]:
        cache = transformers.DynamicCache(config=speaker.config.get_text_config())
        mask, logits = first["attention_mask"], []
        with torch.no_grad(), families.visual_features(speaker):
            speaker(**first, past_key_values=cache, use_cache=True)
            for turn in turns:
                ids = torch.tensor([turn, turn])
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                inputs = {"input_ids": ids, "attention_mask": mask}
                if hasattr(core_of(speaker)[0], "get_rope_index"):
                    # By themselves these go on from a cache with no 2-D mask only.
                    own = (mask.cumsum(1) - 1)[:, -len(turn) :]
                    inputs["position_ids"] = torch.stack([own, own - own % 3, own - own % 4])
                output = speaker(**inputs, past_key_values=cache, use_cache=True)
                logits.append(output.logits[:, -1])
        return logits

    with gap_triton.pruning(model, config):
        pruned = converse(model)
    with MaskingOracle(reference, config.layer, config.keep) as oracle:
        expected = converse(reference)
    assert oracle.dropped[:, -len(turns[1]) - 1 :].any()
    for a, b in zip(pruned, expected, strict=True):
        assert float((a - b).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("model_type", model_types.STATIC_CACHE)
def test_static_cache(model_type: str) -> None:
    model = build_or_skip(model_type)
    inputs = families.prompt(model)
    with families.visual_features(model), gap_triton.pruning(model, GapConfig(keep=0.4, layer=1)):
        dynamic = generate(model, inputs, tokens=TOKENS)
        static = generate(model, inputs, tokens=TOKENS, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    assert error(static, dynamic) <= TOLERANCE


@pytest.mark.parametrize("model_type", model_types.EMBEDDINGS)
def test_found_by_their_embedding(model_type: str) -> None:
    """``inputs_embeds`` without ``input_ids``: the placeholders are recognised by their own embedding."""
    model = build_or_skip(model_type)
    inputs = families.prompt(model)
    ids = inputs.pop("input_ids")
    inputs.pop("image_grid_thw", None)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad(), gap_triton.pruning(model, GapConfig(keep=0.4, layer=1)):
        by_embedding = model(inputs_embeds=embeds, **inputs).logits
        candidates = gap_triton.last_selection(model).candidates
    visual = [[i for i, token in enumerate(row) if token == families.IMAGE] for row in ids.tolist()]
    assert [[i for i in row if i >= 0] for row in candidates.tolist()] == visual
    assert by_embedding.shape[:2] == ids.shape


@pytest.mark.parametrize("model_type", model_types.REFUSED)
def test_refused(model_type: str) -> None:
    model = build_or_skip(model_type)
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "set_attn_implementation")]
    with pytest.raises(ValueError, match=model_types.REFUSED[model_type]) as caught:
        gap_triton.attach(model)
    sentence = str(caught.value)
    assert type(model).__name__ in sentence
    assert re.search(r"\(model_type='[^']+'\)", sentence)
    assert "attn_implementation='sdpa'" in sentence
    after = [m.config._attn_implementation for m in model.modules() if hasattr(m, "set_attn_implementation")]
    assert after == before


@pytest.mark.parametrize("model_type", model_types.NOT_BUILT)
def test_not_built(model_type: str) -> None:
    """Fails as soon as one can be built: it then belongs to the exact or to the refused ones."""
    if model_type not in families.TYPES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    with pytest.raises((ImportError, AttributeError)):
        families.build(model_type)
