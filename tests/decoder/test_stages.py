"""Several stages, and pruning before the decoder: turns, drafts, caches, threads, renumbered ids."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from support import ways
from support.comparison import TOLERANCE, error
from support.conversation import Conversation, next_turn
from support.drafts import answer
from support.embeds import embeds_of_prompt, with_embeds
from support.methods import method
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle
from support.prompts import BATCHES, make_prompt
from support.stages import compare, dropped_by, stages_of
from support.tiny import IMAGE, LAYERS, generate

import gap_triton
from gap_triton import GapConfig, Stage

PYRAMID = GapConfig(0.7, 0, "last_token", then=(Stage(0.4, 1, "text"), Stage(0.15, 3, "last_token")))
BEFORE = GapConfig(0.4, -1, "random")
CONFIGS = {
    "before": BEFORE,
    "before, then inside": GapConfig(0.6, -1, "random", then=(Stage(0.3, 2, "text"),)),
    "pyramid": PYRAMID,
    "nuwa": method("nuwa", LAYERS, cls=True),
}


def prepared(config: GapConfig, name: str = "llava"):
    model = ways.build(name, "gap_triton")
    gap_triton.configure(model, config)
    return model


def told(config: GapConfig, gone: list[torch.Tensor], name: str = "llava"):
    """The oracle that is told which tokens each stage drops; every stage's without those that went before."""
    reference = ways.build(name, {"text_config": ORACLE})
    later = [(stage.layer, dropped) for stage, dropped in zip(config.then, gone[1:], strict=True)]
    return reference, MaskingOracle(reference, config.layer, 1.0, chosen=gone[0], then=later)


def gone_after(model, visual: torch.Tensor) -> list[torch.Tensor]:
    return [dropped_by(selection, visual) for selection in stages_of(gap_triton.last_selection(model))]


# --------------------------------------------------------------------------------------------- what is chosen
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ways.MODELS)
def test_each_stage_chooses_by_its_own_attention(name: str, batch: str) -> None:
    """The oracle scores by itself, in every stage among what is left."""
    model, inputs = prepared(PYRAMID, name), ways.make(name, batch)
    pruned = generate(model, inputs)
    reference = ways.build(name, {"text_config": ORACLE})
    later = [(stage.layer, stage.keep, stage.score) for stage in PYRAMID.then]
    with MaskingOracle(reference, 0, PYRAMID.keep, PYRAMID.score, then=later) as oracle:
        expected = generate(reference, inputs)
        assert all(bool(dropped.any()) for dropped in oracle.later)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["llava/mistral-sliding", "llava/qwen2-ffsss", "llava_next", "llava_onevision/qwen2"]
)
@pytest.mark.parametrize("batch", ["left-padded", "right-padded", "ragged-images"])
def test_other_models(name: str, batch: str) -> None:
    inputs = make_prompt(name, batch)
    compare(name, inputs, PYRAMID)
    # OneVision's vision encoder has no CLS token, and its newlines and NeXT's stand in no grid.
    compare(name, inputs, method("nuwa", LAYERS, cls="onevision" not in name))


def test_layers_hold_what_each_stage_left() -> None:
    for config in CONFIGS.values():
        model, inputs = prepared(config), ways.make("llava", "even")
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        rows = inputs["input_ids"].shape[1]
        stages = stages_of(gap_triton.last_selection(model))
        kept = [rows] * (config.layer + 1)
        for stage, selection in zip(config.stages, stages, strict=True):
            kept = kept[: stage.layer + 1] + [selection.index.shape[1]] * (LAYERS - stage.layer - 1)
        assert [layer.keys.shape[2] for layer in cache.layers] == kept
        if config.layer == -1:
            assert cache.get_seq_length() == rows
        assert kept[-1] < kept[0] or config is BEFORE


# --------------------------------------------------------------------------------------------- turns
@pytest.mark.parametrize("batch", ["even", "left-padded", "ragged-images", "single"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_turns_with_new_images(config: GapConfig, batch: str) -> None:
    """Prompt, an image in the next turn, then words only, on one cache."""
    if config.score == "cls" and not ways.V5:
        pytest.skip("generate() of this transformers encodes the images of the first turn only")
    model, inputs = prepared(config), make_prompt("llava", batch)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    outputs, gone = [], None
    seen: list[torch.Tensor] = []
    handle = embeds_of_prompt(model, seen)
    mask, turn = inputs["attention_mask"], inputs
    for number, images in enumerate((1, 0, None)):
        past = cache.get_seq_length()
        outputs.append(generate(model, turn, tokens=3, past_key_values=cache))
        new = turn["input_ids"][:, past:]
        if number < 2:
            found = gone_after(model, new == IMAGE)
            assert found[-1].any()
            at = [torch.nn.functional.pad(dropped, (past, 0)) for dropped in found]
            gone = (
                at
                if gone is None
                else [
                    torch.nn.functional.pad(a, (0, b.shape[1] - a.shape[1])) | b
                    for a, b in zip(gone, at, strict=True)
                ]
            )
        if images is not None:
            turn = next_turn(outputs[-1].sequences, mask, images, seed=number)
            mask = turn["attention_mask"]
    handle.remove()
    assert gone is not None
    reference, oracle = told(config, gone)
    handle = with_embeds(reference, *seen)
    cache = transformers.DynamicCache(config=reference.config.get_text_config())
    mask, turn = inputs["attention_mask"], inputs
    with oracle:
        for number, pruned in enumerate(outputs):
            expected = generate(reference, turn, tokens=3, past_key_values=cache)
            assert torch.equal(pruned.sequences, expected.sequences)
            assert error(pruned, expected) <= TOLERANCE
            if number < 2:
                turn = next_turn(expected.sequences, mask, (1, 0)[number], seed=number)
                mask = turn["attention_mask"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ways.MODELS)
def test_a_cache_is_changed_by_its_own_methods(name: str, config: GapConfig) -> None:
    """Crop into the image, reorder, repeat: then as the oracle does after the same."""
    if config.merge != "none":
        config = GapConfig(config.keep, -1, "received", "region", then=config.then)
    inputs = ways.make(name, "ragged-images")
    model = prepared(config, name)
    with torch.no_grad():
        model(**inputs)
    reference, oracle = told(config, gone_after(model, inputs["input_ids"] == IMAGE), name)
    order = torch.tensor([1, 0])
    talks = []
    with oracle:
        for candidate in (model, reference):
            talk = Conversation(candidate, inputs)
            talk.go_on(1, 1)
            talk.cache.crop(-20)
            talk.mask = talk.mask[:, :-20]
            talk.cache.reorder_cache(order)
            talk.cache.batch_repeat_interleave(2)
            talk.mask = talk.mask[order].repeat_interleave(2, 0)
            if candidate is reference:

                def changed(x: torch.Tensor, width: int = talk.mask.shape[1]) -> torch.Tensor:
                    return x[:, :width][order].repeat_interleave(2, 0)

                oracle.chosen = changed(oracle.chosen)
                oracle.then = [(layer, changed(dropped)) for layer, dropped in oracle.then]
                oracle.dropped, oracle.later = changed(oracle.dropped), [changed(x) for x in oracle.later]
            talk.go_on(1, 3, 1)
            talks.append(talk)
    for pruned, expected in zip(*(talk.logits for talk in talks), strict=True):
        assert float((pruned - expected).abs().max()) <= TOLERANCE


# --------------------------------------------------------------------------------------------- ways to run
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ways.MODELS)
def test_drafts_leave_no_trace(name: str, config: GapConfig, drafts) -> None:
    if name != "llava" and config.score == "cls":
        config = method("nuwa", LAYERS, cls=False)
    model, inputs = prepared(config, name), ways.make(name, "single")
    greedy = answer(model, inputs)
    script = drafts(greedy.sequences, (2, 0, 3), 9)
    assisted = answer(model, inputs, prompt_lookup_num_tokens=4)
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert error(assisted, greedy) <= TOLERANCE
    assert sum(script.lengths) > len(script.lengths)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("batch", ["left-padded", "ragged-images"])
def test_static_caches(batch: str, config: GapConfig) -> None:
    model, inputs = prepared(config), ways.make("llava", batch)
    dynamic = generate(model, inputs)
    rows = inputs["input_ids"].shape[1]
    kept = [selection.index.shape[1] for selection in stages_of(gap_triton.last_selection(model))]
    static = generate(model, inputs, cache_implementation="static")
    assert torch.equal(static.sequences, dynamic.sequences)
    assert error(static, dynamic) <= TOLERANCE
    cache = gap_triton.static_cache(model, max_cache_len=rows + 5)
    buffers = None
    for _ in range(2):
        static = generate(model, inputs, past_key_values=cache)
        assert torch.equal(static.sequences, dynamic.sequences)
        assert error(static, dynamic) <= TOLERANCE
        lengths = [rows + 5] * (config.layer + 1)
        for stage, left in zip(config.stages, kept, strict=True):
            lengths = lengths[: stage.layer + 1] + [left + 5] * (LAYERS - stage.layer - 1)
        assert [layer.keys.shape[2] for layer in cache.layers] == lengths
        addresses = [layer.keys.data_ptr() for layer in cache.layers]
        assert buffers is None or addresses == buffers
        buffers = addresses
        cache.reset()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_beams_and_several_answers(config: GapConfig) -> None:
    model, inputs = prepared(config), ways.make("llava", "left-padded")
    one = generate(model, inputs)
    several = generate(model, inputs, num_beams=2, num_return_sequences=2)
    assert several.sequences.shape[0] == 4
    assert one.sequences.shape == (2, several.sequences.shape[1])
    first = {key: value[:1] for key, value in inputs.items()}
    alone = generate(model, first, num_beams=2, num_return_sequences=2)
    assert torch.equal(alone.sequences, several.sequences[:2])


def test_threads_share_a_vision_encoder() -> None:
    model = prepared(CONFIGS["nuwa"])
    prompts = [
        ways.make("llava", batch, seed) for batch in ("left-padded", "ragged-images") for seed in range(3)
    ]
    alone = [generate(model, inputs) for inputs in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda inputs: generate(model, inputs), prompts))
    for expected, output in zip(alone, together, strict=True):
        assert torch.equal(output.sequences, expected.sequences)
        assert error(output, expected) <= TOLERANCE


# --------------------------------------------------------------------------------------------- ids
def rotary_and_ids(text, hidden: torch.Tensor, ids: list[int], axes: int):
    positions = torch.tensor(ids).expand(axes, 1, -1) if axes else torch.tensor([ids])
    return text.rotary_emb(hidden, positions), torch.tensor([ids])


@pytest.mark.parametrize("name", ways.MODELS)
def test_compacted_ids_equal_a_plain_loop_over_the_layers(name: str) -> None:
    """With three axes too: survivors of each stage are numbered 0, 1, 2, ... on every axis."""
    config = GapConfig(0.6, -1, "random", ids="compacted", then=(Stage(0.3, 1, "text"),))
    model, inputs = prepared(config, name), ways.make(name, "single")
    seen: list[torch.Tensor] = []
    text = model.model.language_model
    handle = text.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    output = generate(model, inputs, tokens=4)
    handle.remove()
    stages = stages_of(gap_triton.last_selection(model))
    gap_triton.detach(model)
    model.set_attn_implementation("sdpa")
    prompt = inputs["input_ids"].shape[1]
    for step in range(4):
        # What the decoder was given so far, its rows after each stage, and their numbers.
        hidden = torch.cat(seen[: step + 1], 1)
        left = list(range(prompt + step))
        for index, layer in enumerate(text.layers):
            for stage, selection in zip(config.stages, stages, strict=True):
                if index == stage.layer + 1:
                    rows = [*selection.index[0].tolist(), *range(prompt, prompt + step)]
                    hidden = hidden[:, [left.index(row) for row in rows]]
                    left = rows
            ids = list(range(len(left)))
            rotary, positions = rotary_and_ids(text, hidden, ids, 3 if name == ways.MROPE else 0)
            mask = torch.ones(len(left), len(left), dtype=torch.bool).tril()[None, None]
            with torch.no_grad():
                result = layer(
                    hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions
                )
            hidden = result[0] if isinstance(result, tuple) else result
        with torch.no_grad():
            expected = model.lm_head(text.norm(hidden[:, -1]))
        assert float((output.logits[step] - expected).abs().max()) <= 2e-4


@pytest.mark.parametrize("ids", ["kept", "compacted", "permuted", "reordered", "stretched"])
@pytest.mark.parametrize("name", ways.MODELS)
def test_a_sample_does_not_depend_on_its_batch(name: str, ids: str) -> None:
    config = GapConfig(0.4, 1, "text", ids=ids)
    model, inputs = prepared(config, name), make_prompt("llava", "ragged-images")
    inputs = ways.as_mrope(inputs) if name == ways.MROPE else inputs
    batched = generate(model, inputs)
    first = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    real = int(first["attention_mask"].sum())
    first = {key: value[:, -real:] for key, value in first.items()}
    if name == ways.MROPE:
        patches = ways.GRID[0] * ways.GRID[1] * ways.GRID[2]
        first |= {
            "pixel_values": inputs["pixel_values"][:patches],
            "image_grid_thw": inputs["image_grid_thw"][:1],
        }
        if "mm_token_type_ids" in inputs:
            first["mm_token_type_ids"] = inputs["mm_token_type_ids"][:1, -real:]
    else:
        first["pixel_values"] = inputs["pixel_values"][:1]
    alone = generate(model, first)
    assert torch.equal(alone.sequences[0, -6:], batched.sequences[0, -6:])
    for a, b in zip(alone.logits, batched.logits, strict=True):
        assert float((a[0] - b[0]).abs().max()) <= TOLERANCE
