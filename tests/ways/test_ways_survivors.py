"""Ways to run decoders that are handed the survivors alone: with states, windows, chunks, shared keys, an index."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from support import families
from support.comparison import TOLERANCE, error
from support.drafts import answer
from support.installed_types import build_or_skip
from support.model_types import IMAGES_BEFORE
from support.oracle import core_of
from support.survivors import (
    CONFIG,
    LARGE_LOGITS,
    TOKENS,
    WORDS,
    LaterLayersOracle,
    SurvivorsOracle,
    expected_of,
    pruned_by,
    stays_of,
)
from support.tiny import EOS, IMAGE, generate

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.arguments import CACHE
from gap_triton.kv_cache.kept_tokens import HELD_ATTRIBUTE

STATE, WINDOW, CHUNK, SHARED, INDEX, BLOCKS = (
    "qwen3_5",
    "lfm3_vl",
    "llama4",
    "gemma4",
    "qwen4_exp",
    "minimax_m3_vl",
)


def config_at(first: int, *then: int) -> GapConfig:
    """Fewer tokens from layer ``first`` on, and fewer of them behind each of ``then``."""
    stages = tuple(Stage(0.3, layer, "text") for layer in then)
    return replace(CONFIG, layer=first, keep=0.7 if then else CONFIG.keep, then=stages)


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [(STATE, (-1, 1)), (WINDOW, (-1, 2)), (SHARED, (-1, 0)), ("lfm2_vl", (-1, 1, 3))],
)
def test_before_and_in_the_decoder_with_any_cache(model_type: str, layers: tuple[int, ...]) -> None:
    model, config = build_or_skip(model_type), config_at(*layers)
    inputs = families.prompt(model)
    dynamic, _ = pruned_by(model, inputs, config)
    with gap_triton.pruning(model, config):
        shrinks = gap_triton.static_cache(model, inputs["input_ids"].shape[1] + TOKENS)
    for where in ({"cache_implementation": "static"}, {CACHE: shrinks}, {"use_cache": False}):
        other, _ = pruned_by(model, inputs, config, **where)
        assert torch.equal(other.sequences, dynamic.sequences)
        assert error(other, dynamic) <= TOLERANCE


@pytest.mark.parametrize("shrinks", [False, True], ids=["full", "shrunk"])
@pytest.mark.parametrize(
    ("model_type", "layer"),
    [(STATE, -1), (WINDOW, -1), (CHUNK, -1), (SHARED, -1), (INDEX, -1), (STATE, 1), (WINDOW, 2), (SHARED, 0)],
)
def test_static_cache(model_type: str, layer: int, shrinks: bool) -> None:
    if model_type == CHUNK and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("this transformers fails on masks of chunks for a static cache")
    model, config = build_or_skip(model_type), replace(CONFIG, layer=layer)
    inputs = families.prompt(model)
    dynamic, _ = pruned_by(model, inputs, config)
    where = {"cache_implementation": "static"}
    if shrinks:
        with gap_triton.pruning(model, config):
            where = {CACHE: gap_triton.static_cache(model, inputs["input_ids"].shape[1] + TOKENS)}
    static, _ = pruned_by(model, inputs, config, **where)
    assert torch.equal(static.sequences, dynamic.sequences)
    assert error(static, dynamic) <= TOLERANCE


@pytest.mark.parametrize("model_type", ["gemma3", "cohere2_vision"])
def test_static_cache_of_a_decoder_that_begins_with_a_window(model_type: str) -> None:
    """Pruned before layers that can be shortened: the window's mask of a step does not tell what is padding."""
    model = build_or_skip(model_type)
    inputs = families.prompt(model)
    dynamic, _ = pruned_by(model, inputs)
    static, _ = pruned_by(model, inputs, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    assert error(static, dynamic) <= TOLERANCE


@pytest.mark.parametrize("model_type", [STATE, WINDOW, SHARED])
def test_without_a_cache(model_type: str) -> None:
    model = build_or_skip(model_type)
    inputs = families.prompt(model)
    cached, _ = pruned_by(model, inputs)
    again, _ = pruned_by(model, inputs, use_cache=False)
    assert torch.equal(again.sequences, cached.sequences)
    assert error(again, cached) <= TOLERANCE


@pytest.mark.parametrize("model_type", [STATE, SHARED])
def test_a_cache_that_the_decoder_makes_by_itself(model_type: str) -> None:
    model = build_or_skip(model_type)
    inputs = {
        name: value[1:] for name, value in families.prompt(model).items()
    }  # the second sample, without padding
    prompt = inputs["input_ids"].shape[1]
    generated, _ = pruned_by(model, inputs)
    with torch.no_grad(), families.visual_features(model), gap_triton.pruning(model, CONFIG):
        cache = model(**inputs, use_cache=True)[CACHE]
        assert cache.get_seq_length() == prompt
        # The model counts by the cache.
        logits = model(input_ids=generated.sequences[:, [prompt]], **{CACHE: cache}).logits[:, -1]
        assert cache.get_seq_length() == prompt + 1
    assert float((logits - generated.logits[1])[:, :WORDS].abs().max()) <= TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [
        *((model_type, (-1,)) for model_type in (STATE, WINDOW, SHARED, BLOCKS)),
        (STATE, (1,)),
        (WINDOW, (2,)),
        (SHARED, (0,)),
        (STATE, (-1, 1)),
        (SHARED, (-1, 0)),
    ],
)
def test_another_turn_with_an_image_on_the_same_cache(model_type: str, layers: tuple[int, ...]) -> None:
    """Two turns with images in them, generated tokens after each; against the survivors of the whole conversation."""
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    first = families.prompt(model)
    image = [families.IMAGE] * families.visual_tokens(model_type)
    turns = [
        first["input_ids"],
        *(torch.tensor([t, t]) for t in ([11], [9, *image, 8, 7, 6], [12], [13, 14])),
    ]
    ids = torch.cat(turns, dim=1)
    mask = torch.nn.functional.pad(
        first["attention_mask"], (0, ids.shape[1] - first["input_ids"].shape[1]), value=1
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if hasattr(core_of(model)[0], "get_rope_index"):
        positions = torch.stack([positions, positions - positions % 3, positions - positions % 4])
    logits, stays, seen, start = [], [], [], 0
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with torch.no_grad(), gap_triton.pruning(model, config_at(*layers)):
        for turn in turns:
            end = start + turn.shape[1]
            inputs = {"input_ids": turn, "position_ids": positions[..., start:end], CACHE: cache}
            logits.append(model(**inputs, attention_mask=mask[:, :end], use_cache=True).logits)
            held = mask[:, start:end].bool()
            seen.append(held)
            if (turn == families.IMAGE).any():
                selection = gap_triton.last_selection(model)
                if selection.before is not None:
                    seen[-1] = stays_of(selection.before, held)
                held = stays_of(selection, held)
            stays.append(held)
            start = end
    kept = torch.cat(stays, dim=1)
    assert int((mask.bool() & ~kept)[:, first["input_ids"].shape[1] :].sum()) > 0
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    oracle = SurvivorsOracle(reference, kept, ids.shape[1])
    if layers[-1] >= 0:
        oracle = LaterLayersOracle(reference, kept, torch.cat(seen, dim=1), ids.shape[1], layers[-1])
    with torch.no_grad(), oracle:
        expected = reference(**whole).logits
    assert float((torch.cat(logits, dim=1) - expected)[kept].abs().max()) <= LARGE_LOGITS


@pytest.mark.parametrize("right", [(4,), (2, 0), (0,)], ids=str)
@pytest.mark.parametrize("model_type", [WINDOW, SHARED, BLOCKS])
def test_drafts(model_type: str, right: tuple[int, ...], drafts) -> None:
    """Drafts are taken back from convolutions, windows and what shares keys; transformers refuses it of recurrent states."""
    model = build_or_skip(model_type)
    inputs = {name: value[1:] for name, value in families.prompt(model).items()}
    with families.visual_features(model), gap_triton.pruning(model, CONFIG):
        plain = answer(model, inputs)
        script = drafts(plain.sequences, right, wrong=9)
        assisted = answer(model, inputs, prompt_lookup_num_tokens=4)
    assert max(script.lengths) == 4
    assert torch.equal(assisted.sequences, plain.sequences)
    assert error(assisted, plain) <= TOLERANCE


def test_beams() -> None:
    """The score of each sentence is that of its tokens after the survivors alone, whatever beams it was moved between."""
    model, reference = build_or_skip(STATE), build_or_skip(STATE)
    inputs = families.prompt_with_pixels(model, IMAGES_BEFORE[STATE])
    prompt = inputs["input_ids"].shape[1]
    with gap_triton.pruning(model, CONFIG):
        output = generate(model, inputs, tokens=TOKENS, num_beams=3, length_penalty=0.0, output_scores=True)
        every = stays_of(
            gap_triton.last_selection(model), inputs["attention_mask"].repeat_interleave(3, dim=0)
        )
    stays = every[::3]
    assert torch.equal(every, stays.repeat_interleave(3, dim=0))
    logits = expected_of(reference, inputs, output.sequences, stays, features=False)
    steps = [
        step.log_softmax(-1).gather(1, output.sequences[:, [prompt + i]]) for i, step in enumerate(logits)
    ]
    expected = torch.cat(steps, dim=1).sum(dim=1)
    assert float((output.sequences_scores - expected).abs().max()) <= TOKENS * TOLERANCE
    assert output.beam_indices.diff(dim=1)[:, : TOKENS - 1].any()  # some beam was left


@pytest.mark.parametrize("layers", [(-1,), (-1, 1)], ids=str)
def test_decode_steps_are_one_graph(layers: tuple[int, ...]) -> None:
    """By `generate` itself, on a static cache: for prompts of one shape, whatever tokens each of them keeps."""
    model = build_or_skip("lfm2_vl")
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, example: list[object]) -> object:
        graphs.append(module)
        return module.forward

    config = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # generate() compiles on accelerators only, unless told so
    inputs = families.prompt(model)
    words = (inputs["input_ids"] > EOS) & (inputs["input_ids"] < IMAGE)
    kept = []
    with (
        families.visual_features(model),
        gap_triton.pruning(model, replace(config_at(*layers), score="text_similarity")),
    ):
        for shift in (0, 1):
            prompt = inputs | {"input_ids": inputs["input_ids"] + shift * words}
            eager = generate(model, prompt, tokens=3)
            kept.append(gap_triton.last_selection(model).index)
            where = {"cache_implementation": "static", "compile_config": config}
            compiled = generate(model, prompt, tokens=3, **where)
            assert torch.equal(compiled.sequences, eager.sequences)
            assert error(compiled, eager) <= TOLERANCE
    assert not torch.equal(*kept)
    assert len(graphs) == 1


def test_a_decoder_that_fails_leaves_a_cache_that_answers_as_before() -> None:
    model = build_or_skip(STATE)
    inputs = families.prompt(model)
    cache = transformers.DynamicCache(config=model.config.get_text_config())

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with torch.no_grad(), families.visual_features(model), gap_triton.pruning(model, CONFIG):
        handle = core_of(model)[1].layers[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**inputs, **{CACHE: cache})
        handle.remove()
        assert not getattr(cache, HELD_ATTRIBUTE)
        with pytest.raises(ValueError, match="left from a forward that failed"):
            model(**inputs, **{CACHE: cache})
