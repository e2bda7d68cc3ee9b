"""Caches of every kind, and what may be done to them between two forwards."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from support.comparison import TOLERANCE, error
from support.conversation import Conversation, next_turn
from support.tiny import IMAGE, LAYERS, generate
from support.ways import CONFIG, MODELS, MROPE, V5, build, make, pair

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.arguments import CACHE


def converse(
    name: str,
    inputs: dict[str, torch.Tensor],
    act,
    config: GapConfig = CONFIG,
    blocks=(1, 3, 1),
    cache_of=None,
) -> None:
    """Prompt, two steps, ``act`` on the cache, further blocks: with pruning, and as the oracle sees it.

    The pruned model has the cache that ``cache_of`` makes for it.
    """
    model, reference, oracle = pair(name, config)
    with oracle:
        cache = cache_of and cache_of(model)
        talks = [Conversation(model, inputs, cache), Conversation(reference, inputs)]
        for talk in talks:
            talk.go_on(1, 1)
            assert talk.model is model or oracle.dropped.any()
            act(talk)
            if talk.model is reference:
                act(talk, oracle)
            talk.go_on(*blocks)
    for pruned, expected in zip(*(talk.logits for talk in talks), strict=True):
        assert float((pruned - expected).abs().max()) <= TOLERANCE


SAMPLES = {
    "reorder": ("reorder_cache", torch.tensor([1, 0, 1]), lambda x: x[[1, 0, 1]]),
    "select": ("batch_select_indices", torch.tensor([1]), lambda x: x[[1]]),
    "select-list": ("batch_select_indices", [1, 0], lambda x: x[[1, 0]]),
    "repeat": ("batch_repeat_interleave", 2, lambda x: x.repeat_interleave(2, 0)),
}


@pytest.mark.parametrize("act", SAMPLES)
@pytest.mark.parametrize("batch", ["left-padded", "ragged-images", "one-without-image"])
@pytest.mark.parametrize("name", MODELS)
def test_samples_of_a_pruned_cache(name: str, batch: str, act: str) -> None:
    method, argument, expected = SAMPLES[act]

    def change(talk: Conversation, oracle=None) -> None:
        if oracle is not None:
            oracle.dropped = expected(oracle.dropped)
            return
        getattr(talk.cache, method)(argument)
        talk.mask = expected(talk.mask)

    converse(name, make(name, batch), change)


@pytest.mark.parametrize("tokens", [1, 4, 20, 40], ids=lambda n: f"minus-{n}")
@pytest.mark.parametrize("batch", ["even", "left-padded", "right-padded", "ragged-images", "ends-in-image"])
@pytest.mark.parametrize("name", MODELS)
def test_crop(name: str, batch: str, tokens: int) -> None:
    """Off generated tokens, off the question, and into the image."""

    def crop(talk: Conversation, oracle=None) -> None:
        left = talk.mask.shape[1] - (0 if oracle is not None else tokens)
        if oracle is not None:
            oracle.dropped = oracle.dropped[:, :left]
            return
        talk.cache.crop(-tokens)
        talk.mask = talk.mask[:, :left]
        assert talk.cache.get_seq_length() == left

    converse(name, make(name, batch), crop)


STATIC = {
    "full": lambda model: transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=120),
    "shorter-layers": lambda model: gap_triton.static_cache(model, max_cache_len=120),
}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="this transformers can't crop a static cache",
)
@pytest.mark.parametrize("tokens", [1, 4, 20, 40], ids=lambda n: f"minus-{n}")
@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize("name", MODELS)
def test_crop_of_a_static_cache(name: str, kind: str, tokens: int) -> None:
    def crop(talk: Conversation, oracle=None) -> None:
        left = talk.mask.shape[1] - (0 if oracle is not None else tokens)
        if oracle is not None:
            oracle.dropped = oracle.dropped[:, :left]
            return
        talk.cache.crop(-tokens)
        talk.mask = talk.mask[:, :left]
        assert int(talk.cache.get_seq_length()) == left

    converse(name, make(name, "left-padded"), crop, cache_of=STATIC[kind])


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.18"),
    reason="this transformers crops by a number of tokens only",
)
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_crop_to_a_length(tokens: int) -> None:
    def crop(talk: Conversation, oracle=None) -> None:
        if oracle is not None:
            oracle.dropped = oracle.dropped[:, : talk.mask.shape[1]]
            return
        talk.mask = talk.mask[:, :-tokens]
        talk.cache.crop(talk.mask.shape[1])

    converse("llava", make("llava", "ragged-images"), crop)


def test_crop_everything_starts_afresh() -> None:
    model, _, _ = pair()
    inputs = make("llava", "left-padded")
    talk = Conversation(model, inputs)
    talk.cache.crop(-inputs["input_ids"].shape[1])
    with torch.no_grad():
        again = model(**inputs, past_key_values=talk.cache).logits[:, -1:]
    assert torch.equal(again, talk.logits[0])


def test_crop_into_a_renumbered_prompt() -> None:
    model, _, _ = pair(config=GapConfig(keep=0.4, layer=1, ids="compacted"))
    talk = Conversation(model, make("llava", "even"))
    talk.go_on(1)
    talk.cache.crop(-1)
    with pytest.raises(
        ValueError, match=r"crop\(-1\) reaches into a pruned prompt whose ids were renumbered"
    ):
        talk.cache.crop(-1)


def test_crop_of_a_cache_pruned_before_the_decoder() -> None:
    config = GapConfig(keep=0.4, layer=-1, score="random")
    model, _, _ = pair(config=config)
    inputs = make("llava", "left-padded")
    once, cropped = Conversation(model, inputs), Conversation(model, inputs)
    cropped.go_on(1, 1, 1)
    cropped.cache.crop(-3)
    cropped.mask = cropped.mask[:, :-3]
    once.go_on(1, 1)
    cropped.go_on(1, 1)
    for expected, actual in zip(once.logits[1:], cropped.logits[-2:], strict=True):
        assert torch.equal(expected, actual)


def test_another_question_about_the_same_image() -> None:
    """A copy of a pruned cache goes on by itself."""

    def fork(talk: Conversation, oracle=None) -> None:
        if oracle is None:
            original = talk.cache
            talk.cache = copy.deepcopy(original)
            original.crop(-5)
            original.reorder_cache(torch.tensor([1, 0]))

    converse("llava", make("llava", "ragged-images"), fork)


# ------------------------------------------------------------------------------------------------ an image, then questions
BLIND = {
    "cls": GapConfig(0.4, -1, "cls"),
    "received": GapConfig(0.4, -1, "received"),
    "key norm of the tower": GapConfig(0.4, -1, "key_norm"),
    "merged": GapConfig(0.4, -1, "cls", "region", "nearest"),
    "random": GapConfig(0.4, -1, "random"),
    "key norm": GapConfig(0.4, 1, "key_norm"),
    "spatial": GapConfig(0.4, 1, "spatial"),
    "stages": GapConfig(0.7, -1, "random", then=(Stage(0.4, 0, "key_norm"), Stage(0.2, 2, "spatial"))),
    "compacted": GapConfig(0.4, 1, "key_norm", ids="compacted"),
}


def dummy_then_crop(model, cache) -> None:
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    cache.crop(-1)


def prefix(model, inputs: dict[str, torch.Tensor], words: int):
    """A cache of the prompt up to ``words`` words behind its last image, and how many tokens that are."""
    length = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1 + words
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    cut = {
        key: value[:, :length] if key in ("input_ids", "attention_mask", "mm_token_type_ids") else value
        for key, value in inputs.items()
    }
    with torch.no_grad():
        model(**cut, past_key_values=cache)
    return cache, length


def ask(model, inputs: dict[str, torch.Tensor], cache, length: int) -> torch.Tensor:
    """Logits of what follows the first ``length`` tokens."""
    ids = inputs["input_ids"][:, length:]
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits


@pytest.mark.parametrize("config", BLIND.values(), ids=BLIND)
@pytest.mark.parametrize("name", MODELS)
def test_questions_about_an_image_that_was_read_once(name: str, config: GapConfig) -> None:
    """Where nothing that ranks looks at text, a cached image is as good as a whole prompt."""
    if name == MROPE and Version(transformers.__version__) < Version("5"):
        pytest.skip("this transformers counts from 0 where it is told no positions, pruned or not")
    if name == MROPE and config.score == "cls":
        config = dataclasses.replace(config, score="received")  # its vision encoder has no CLS token
    model, inputs = build(name, "gap_triton"), make(name, "single")
    gap_triton.configure(model, config)
    cache, length = prefix(model, inputs, words=1)
    for seed in (1, 2):
        question = dict(inputs)
        words = torch.randint(5, 140, (1, 6), generator=torch.Generator().manual_seed(seed))
        question["input_ids"] = torch.cat([inputs["input_ids"][:, :length], words], 1)
        question["attention_mask"] = torch.ones_like(question["input_ids"])
        if "mm_token_type_ids" in inputs:
            question["mm_token_type_ids"] = (question["input_ids"] == IMAGE).int()
        with torch.no_grad():
            whole = model(**question).logits[:, length:]
        for dummy in (False, True):
            again = copy.deepcopy(cache)
            if dummy:
                dummy_then_crop(model, again)
            assert float((ask(model, question, again, length) - whole).abs().max()) <= TOLERANCE


def test_generate_in_chunks_where_nothing_looks_at_text() -> None:
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers can't prefill a prompt with an image in chunks, pruned or not")
    model, inputs = build("llava", "gap_triton"), make("llava", "single")
    gap_triton.configure(model, BLIND["key norm"])
    length = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 2
    whole = generate(model, inputs)
    chunked = generate(model, inputs, prefill_chunk_size=length)
    assert torch.equal(whole.sequences, chunked.sequences)
    assert error(whole, chunked) <= TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        GapConfig(0.4, 1),
        GapConfig(0.4, 1, "last_token"),
        GapConfig(0.4, -1, "text_similarity"),
        GapConfig(0.7, -1, "random", then=(Stage(0.3, 1),)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dummy", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_choice_that_asks_text_needs_the_whole_prompt(name: str, config: GapConfig, dummy: bool) -> None:
    """A dummy token that is cropped away again does not make it whole."""
    model, inputs = build(name, "gap_triton"), make(name, "single")
    gap_triton.configure(model, config)
    cache, length = prefix(model, inputs, words=2)
    if dummy:
        dummy_then_crop(model, cache)
    with pytest.raises(ValueError, match="tokens were chosen by a prompt that was not complete"):
        ask(model, inputs, cache, length)


@pytest.mark.parametrize("what", ["ends in its image", "another image follows"])
def test_a_first_part_that_is_not_whole(what: str) -> None:
    model, inputs = build("llava", "gap_triton"), make("llava", "single")
    gap_triton.configure(model, BLIND["random"])
    cache, length = prefix(model, inputs, words=0 if "ends" in what else 2)
    more = (
        make("llava", "single", seed=4)
        if "another" in what
        else {"input_ids": inputs["input_ids"][:, length:]}
    )
    more.pop("attention_mask", None)
    with torch.no_grad(), pytest.raises(ValueError, match="holds all images and ends in text"):
        model(**more, past_key_values=cache)


# ------------------------------------------------------------------------------------------------ failures on the way
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_a_failed_prompt_leaves(kind: str, layer: int) -> None:
    """Before and behind the cut: it can't go on, and says so; after reset() it is as good as new."""
    model, _, _ = pair()
    inputs = make("llava", "left-padded")
    expected = generate(model, inputs)
    text = model.config.get_text_config()
    cache = transformers.DynamicCache(config=text)
    if kind == "static":
        cache = gap_triton.static_cache(model, max_cache_len=100)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.language_model.layers[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, inputs, past_key_values=cache)
    handle.remove()
    retries = [lambda: model(**inputs, past_key_values=cache)]
    if V5:  # older transformers' generate() fails by itself, as nothing of the prompt is left to run
        retries.append(lambda: generate(model, inputs, past_key_values=cache))
    for retry in retries:
        with torch.no_grad(), pytest.raises(ValueError, match=rf"{CACHE} is left from a forward that failed"):
            retry()
    model.train()  # and then runs unpruned
    with torch.no_grad(), pytest.raises(ValueError, match=rf"{CACHE} is left from a forward that failed"):
        model(**inputs, past_key_values=cache)
    model.eval()
    cache.reset()
    if kind == "dynamic" and cache.get_seq_length():
        return  # this transformers' DynamicCache.reset() zeroes the cache but keeps its length
    again = generate(model, inputs, past_key_values=cache)
    assert torch.equal(again.sequences, expected.sequences)
    assert error(again, expected) <= TOLERANCE


def test_a_block_of_words_that_failed() -> None:
    """In a layer that nothing else would tell from the ones before it."""
    model, _, _ = pair()
    talk = Conversation(model, make("llava", "even"))
    talk.go_on(1)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.language_model.layers[LAYERS - 1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        talk.go_on(3)
    handle.remove()
    with pytest.raises(ValueError, match=rf"{CACHE} is left from a forward that failed"):
        talk.go_on(3)


@pytest.mark.parametrize("config", [CONFIG, GapConfig(0.4, -1, "random")], ids=str)
def test_no_rows_at_all(config: GapConfig) -> None:
    """Whatever the unpruned model makes of them."""
    results = []
    for implementation in ("sdpa", "gap_triton"):
        model = build("llava", implementation)
        if implementation == "gap_triton":
            gap_triton.configure(model, config)
        try:
            with torch.no_grad():
                results.append(model(input_ids=torch.empty(1, 0, dtype=torch.long)).logits.shape)
        except Exception as error:
            results.append((type(error), str(error)))
    assert results[0] == results[1]


# ------------------------------------------------------------------------------------------------ static caches
@pytest.mark.parametrize(
    "batch", ["even", "left-padded", "right-padded", "ragged-images", "one-without-image"]
)
@pytest.mark.parametrize("name", MODELS)
def test_static_cache_of_the_needed_size(name: str, batch: str) -> None:
    model, _, _ = pair(name)
    inputs = make(name, batch)
    dynamic = generate(model, inputs)
    rows = inputs["input_ids"].shape[1]
    kept = gap_triton.last_selection(model).index.shape[1]
    cache = gap_triton.static_cache(model, max_cache_len=rows + 5)
    for _ in range(2):
        static = generate(model, inputs, past_key_values=cache)
        assert torch.equal(static.sequences, dynamic.sequences)
        assert error(static, dynamic) <= TOLERANCE
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        early = CONFIG.layer + 1
        assert lengths == [rows + 5] * early + [kept + 5] * (LAYERS - early)
        cache.reset()


def test_static_cache_is_sized_anew_after_a_reset() -> None:
    model, _, _ = pair()
    inputs = make("llava", "even")
    cache = gap_triton.static_cache(model, max_cache_len=100)
    for keep in (0.4, 0.4, 0.8, 1.0, 0.2):
        gap_triton.configure(model, GapConfig(keep=keep, layer=1))
        dynamic = generate(model, inputs)
        before = cache.layers[3].keys
        static = generate(model, inputs, past_key_values=cache)
        assert error(static, dynamic) <= TOLERANCE
        dropped = 36 - GapConfig(keep=keep).count(36)
        assert [layer.keys.shape[2] for layer in cache.layers] == [100] * 2 + [100 - dropped] * 3
        same = before is not None and before.shape == cache.layers[3].keys.shape
        assert not same or cache.layers[3].keys is before  # compiled code holds on to addresses
        cache.reset()


def test_static_cache_takes_another_turn() -> None:
    model, _, _ = pair()
    steps = []
    for cache in (
        transformers.DynamicCache(config=model.config.get_text_config()),
        gap_triton.static_cache(model, max_cache_len=200),
    ):
        inputs = make("llava", "ragged-images")
        first = generate(model, inputs, tokens=4, past_key_values=cache)
        second = next_turn(first.sequences, inputs["attention_mask"], images=1, seed=3, pad=2)
        steps.append((first, generate(model, second, tokens=4, past_key_values=cache)))
    for dynamic, static in zip(*steps, strict=True):
        assert torch.equal(dynamic.sequences, static.sequences)
        assert error(dynamic, static) <= TOLERANCE


def test_static_cache_with_sliding_layers() -> None:
    model, _, _ = pair("llava/qwen2-ffsss")
    inputs = make("llava/qwen2-ffsss", "left-padded")
    dynamic = generate(model, inputs)
    static = generate(model, inputs, past_key_values=gap_triton.static_cache(model, max_cache_len=80))
    assert error(static, dynamic) <= TOLERANCE


@pytest.mark.parametrize("batch", ["even", "left-padded"])
def test_static_cache_before_the_decoder(batch: str) -> None:
    model, _, _ = pair(config=GapConfig(keep=0.4, layer=-1, score="random"))
    inputs = make("llava", batch)
    dynamic = generate(model, inputs)
    for cache in (
        transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=80),
        gap_triton.static_cache(model, max_cache_len=80),
    ):
        assert error(generate(model, inputs, past_key_values=cache), dynamic) <= TOLERANCE


@pytest.mark.parametrize("length", [0, -3, 2.5, True, None])
def test_static_cache_of_a_bad_length(length: object) -> None:
    with pytest.raises(ValueError, match=rf"max_cache_len={length}: expected an int >= 1"):
        gap_triton.static_cache(build("llava", "gap_triton"), length)


def test_static_cache_of_a_length_of_numpy() -> None:
    cache = gap_triton.static_cache(build("llava", "gap_triton"), np.int64(80))
    assert type(cache.layers[0].max_cache_len) is int
