"""The ways to generate: sampling, beams, several turns on one cache, threads, no cache."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from packaging.version import Version
from support.comparison import TOLERANCE, error
from support.conversation import next_turn
from support.prompts import make_prompt
from support.tiny import generate, prompt
from support.ways import pair

import gap_triton
from gap_triton.arguments import CACHE, CACHE_NAMES


@pytest.mark.parametrize("batch", ["left-padded", "ragged-images", "one-without-image"])
def test_sampling(batch: str) -> None:
    model, reference, oracle = pair()
    inputs = make_prompt("llava", batch)
    torch.manual_seed(7)
    pruned = generate(model, inputs, do_sample=True, num_return_sequences=2, top_k=20)
    torch.manual_seed(7)
    with oracle:
        expected = generate(reference, inputs, do_sample=True, num_return_sequences=2, top_k=20)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE


@pytest.mark.parametrize("batch", ["even", "left-padded", "ragged-images"])
def test_beams(batch: str) -> None:
    if batch == "ragged-images" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers repeats images wrongly in beam search with several images per sample")
    model, reference, oracle = pair()
    inputs = make_prompt("llava", batch)
    pruned = generate(model, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    with oracle:
        expected = generate(reference, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert float((pruned.sequences_scores - expected.sequences_scores).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("batch", ["even", "left-padded", "right-padded", "ragged-images"])
def test_static_cache(batch: str) -> None:
    model, _, _ = pair()
    inputs = make_prompt("llava", batch)
    dynamic = generate(model, inputs)
    for _ in range(2):  # the second call reuses the buffers
        static = generate(model, inputs, cache_implementation="static")
        assert torch.equal(static.sequences, dynamic.sequences)
        assert error(static, dynamic) <= TOLERANCE


@pytest.mark.parametrize("name", ["llava", "llava/mistral-sliding", "llava/qwen2-ffsss", "llava/qwen2-sfsfs"])
@pytest.mark.parametrize("turns", [(0, 0), (1, 0), (0, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("batch", ["left-padded", "ragged-images", "one-without-image"])
def test_several_turns_on_one_cache(name: str, batch: str, turns: tuple[int, ...]) -> None:
    """Images in the first turn; ``turns`` says how many come in each later one."""
    model, reference, oracle = pair(name)
    sequences = []
    for candidate, context in ((model, None), (reference, oracle)):
        cache = transformers.DynamicCache(config=candidate.config.get_text_config())
        inputs = make_prompt(name, batch)
        steps = []
        if context is not None:
            context.__enter__()
        for turn, images in enumerate((None, *turns)):
            if images is not None:
                inputs = next_turn(output.sequences, inputs["attention_mask"], images, turn, pad=2)  # noqa: F821
            output = generate(candidate, inputs, tokens=4, past_key_values=cache)
            steps.append(output)
        if context is not None:
            context.__exit__(None, None, None)
        sequences.append(steps)
    for pruned, expected in zip(*sequences, strict=True):
        assert torch.equal(pruned.sequences, expected.sequences)
        assert error(pruned, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["llava", "llava/mistral-sliding"])
@pytest.mark.parametrize("turns", [(0, 1), (1, 0)], ids=str)
def test_several_turns_on_a_static_cache(name: str, turns: tuple[int, ...]) -> None:
    model, _, _ = pair(name)
    steps: dict[str, list] = {}
    for kind in ("dynamic", "static"):
        text = model.config.get_text_config()
        cache = transformers.DynamicCache(config=text)
        if kind == "static":
            cache = transformers.StaticCache(config=text, max_cache_len=300)
        inputs = prompt("llava", images=((), ()))  # left-padded
        for turn, images in enumerate((None, *turns)):
            if images is not None:
                start = steps["dynamic"][turn - 1].sequences
                inputs = next_turn(start, inputs["attention_mask"], images, turn, pad=2)
            output = generate(model, inputs, tokens=4, past_key_values=cache)
            steps.setdefault(kind, []).append(output)
    for dynamic, static in zip(*steps.values(), strict=True):
        assert error(dynamic, static) <= TOLERANCE


def test_two_text_turns_in_a_row() -> None:
    """Blocks that drop nothing may follow one another once a pruned prompt has been answered."""
    model, reference, oracle = pair()
    outputs = []
    with oracle:
        for candidate in (model, reference):
            cache = transformers.DynamicCache(config=candidate.config.get_text_config())
            generate(candidate, make_prompt("llava", "even"), tokens=3, past_key_values=cache)
            for seed in range(3):
                block = torch.randint(5, 140, (2, 4), generator=torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    logits = candidate(input_ids=block, past_key_values=cache).logits
            outputs.append(logits)
    assert float((outputs[0] - outputs[1]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("extra", [0, 1])
def test_a_mask_as_long_as_a_static_cache(extra: int) -> None:
    """Columns of the mask behind the prompt belong to tokens that do not exist yet."""
    model, _, _ = pair()
    inputs = make_prompt("llava", "left-padded")
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for longer in (mask, torch.cat([mask, torch.full((2, 20), extra)], 1)):
        cache = transformers.StaticCache(
            config=model.config.get_text_config(), max_cache_len=mask.shape[1] + 20
        )
        with torch.no_grad():
            output = model(
                **inputs | {"attention_mask": longer}, position_ids=positions, past_key_values=cache
            )
        logits.append(output.logits[:, -1])
    assert torch.equal(*logits)


def test_a_mask_that_hides_prompt_text_later() -> None:
    model, reference, oracle = pair()
    inputs = make_prompt("llava", "even")
    hidden = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    hidden[:, 1:4] = 0
    logits = []
    with oracle:
        for candidate in (model, reference):
            cache = transformers.DynamicCache(config=candidate.config.get_text_config())
            with torch.no_grad():
                candidate(**inputs, past_key_values=cache)
                step = candidate(
                    input_ids=torch.full((2, 1), 7),
                    attention_mask=hidden,
                    position_ids=torch.full((2, 1), inputs["input_ids"].shape[1]),
                    past_key_values=cache,
                )
            logits.append(step.logits)
    assert float((logits[0] - logits[1]).abs().max()) <= TOLERANCE


def test_text_first_then_an_image_on_the_same_cache() -> None:
    model, reference, oracle = pair()
    first = prompt("llava", images=((), ()))
    outputs = []
    with oracle:
        for candidate in (model, reference):
            cache = transformers.DynamicCache(config=candidate.config.get_text_config())
            start = generate(candidate, first, tokens=3, past_key_values=cache)
            turn = next_turn(start.sequences, first["attention_mask"], 1, seed=5)
            outputs.append(generate(candidate, turn, tokens=4, past_key_values=cache))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert error(*outputs) <= TOLERANCE


def test_a_cache_that_is_reset_starts_afresh() -> None:
    model, _, _ = pair()
    inputs = make_prompt("llava", "left-padded")
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    first = generate(model, inputs, past_key_values=cache)
    cache.reset()
    if cache.get_seq_length():
        pytest.skip("this transformers' DynamicCache.reset() zeroes the cache but keeps its length")
    again = generate(model, inputs, past_key_values=cache)
    assert torch.equal(first.sequences, again.sequences)
    assert error(first, again) == 0.0


def test_threads_share_a_model() -> None:
    model, _, _ = pair()
    prompts = [
        make_prompt("llava", batch, seed) for batch in ("left-padded", "ragged-images") for seed in range(4)
    ]
    alone = [generate(model, inputs) for inputs in prompts]
    selections = []
    for inputs in prompts:
        with torch.no_grad():
            model(**inputs)
        selections.append(gap_triton.last_selection(model))

    def work(inputs: dict[str, torch.Tensor]):
        output = generate(model, inputs)
        return output, gap_triton.last_selection(model)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, prompts))
    for expected, selection, (output, seen) in zip(alone, selections, together, strict=True):
        assert torch.equal(output.sequences, expected.sequences)
        assert error(output, expected) == 0.0
        assert torch.equal(seen.index, selection.index)


def test_later_layers_hold_fewer_tokens() -> None:
    model, _, _ = pair()
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    inputs = make_prompt("llava", "even")
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    full, dropped = inputs["input_ids"].shape[1], 36 - 15
    assert [cache.get_seq_length(i) for i in range(5)] == [
        full,
        full,
        full - dropped,
        full - dropped,
        full - dropped,
    ]


@pytest.mark.parametrize("argument", CACHE_NAMES)
def test_the_cache_by_every_name_of_its_argument(argument: str) -> None:
    """transformers 5.24 has a new name, and takes the old one too."""
    model, reference, oracle = pair()
    outputs = []
    with oracle, torch.no_grad():
        for candidate in (model, reference):
            cache = transformers.DynamicCache(config=candidate.config.get_text_config())
            inputs = make_prompt("llava", "left-padded")
            generate(candidate, inputs, tokens=3, **{argument: cache})
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
            token = torch.full((2, 1), 7)
            outputs.append(candidate(token, attention_mask=mask, **{argument: cache}).logits)
    assert float((outputs[0] - outputs[1]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("part", ["head", "owner"])
def test_arguments_by_position(part: str) -> None:
    """A mask, a cache and labels count wherever they stand in a call."""
    model, _, _ = pair()
    module = model if part == "head" else model.model
    inputs = make_prompt("llava", "left-padded")
    names = list(inspect.signature(module.forward).parameters)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    given = {**inputs, CACHE: cache}
    last = max(names.index(name) for name in given)
    with torch.no_grad():
        expected = module(**inputs)[0]
        output = module(*(given.get(name) for name in names[: last + 1]))[0]
    assert torch.equal(output, expected)
    held = [layer.get_seq_length() for layer in cache.layers]
    assert held[-1] < held[0] == inputs["input_ids"].shape[1]
