"""Caches of every kind, and what may be done to them between two forwards."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from test_generation import next_turn
from test_oracle import TOLERANCE, error
from tiny import LAYERS, generate
from ways import CONFIG, MODELS, MROPE, build, make, pair

import gap_triton
from gap_triton import GapConfig


class Conversation:
    """One model, its cache, and the mask and the ids of everything that has gone through it."""

    def __init__(self, model, inputs: dict[str, torch.Tensor], cache=None) -> None:
        self.model = model
        self.cache = cache or transformers.DynamicCache(config=model.config.get_text_config())
        self.mask = inputs["attention_mask"]
        with torch.no_grad():
            self.logits = [model(**inputs, past_key_values=self.cache).logits[:, -1:]]

    def go_on(self, *blocks: int) -> None:
        """Blocks of words, one column of them the same for all samples."""
        for seed, rows in enumerate(blocks):
            words = torch.randint(5, 140, (rows,), generator=torch.Generator().manual_seed(seed))
            batch, past = self.mask.shape
            self.mask = torch.cat([self.mask, torch.ones(batch, rows, dtype=torch.long)], 1)
            position_ids = (self.mask.cumsum(1) - 1).clamp(min=0)[:, past:]
            if self.model.config.model_type == MROPE:
                position_ids = position_ids.expand(3, -1, -1)
            with torch.no_grad():
                output = self.model(
                    input_ids=words.expand(batch, -1),
                    attention_mask=self.mask,
                    position_ids=position_ids,
                    past_key_values=self.cache,
                )
            self.logits.append(output.logits)


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
