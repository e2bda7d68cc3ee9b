"""Assisted decoding and prompt lookup: drafts are no part of the prompt, and rejected ones leave no trace."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from support.comparison import TOLERANCE, error
from support.drafts import TOKENS, answer
from support.tiny import BOS, EOS, IMAGE, VIDEO
from support.ways import CONFIG, MODELS, V5, build, make, pair

import gap_triton
from gap_triton import GapConfig
from gap_triton.arguments import CACHE


@pytest.mark.parametrize(
    ("right", "wrong"), [((0,), 9), ((4,), 9), ((2, 0, 3), 9), ((2, 0, 3), IMAGE)], ids=str
)
@pytest.mark.parametrize("batch", ["single", "single-ends-in-image"])
@pytest.mark.parametrize("name", MODELS)
def test_drafts_leave_no_trace(name: str, batch: str, right: tuple[int, ...], wrong: int, drafts) -> None:
    model, _, _ = pair(name, CONFIG)
    inputs = make(name, batch)
    greedy = answer(model, inputs)
    kept = gap_triton.last_selection(model)
    if (
        wrong == IMAGE
    ):  # before the first token a placeholder would belong to the prompt, and need its features
        right = (4, *right)
    script = drafts(greedy.sequences, right, wrong)
    assisted = answer(model, inputs, prompt_lookup_num_tokens=4)
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert error(assisted, greedy) <= TOLERANCE
    assert torch.equal(gap_triton.last_selection(model).index, kept.index)
    assert sum(script.lengths) > len(script.lengths)


@pytest.mark.parametrize("ids", ["compacted", "permuted", "reordered", "stretched"])
def test_drafts_with_other_id_rules(ids: str, drafts) -> None:
    model, _, _ = pair("llava", GapConfig(keep=0.4, layer=1, ids=ids, score="text"))
    inputs = make("llava", "single")
    greedy = answer(model, inputs)
    drafts(greedy.sequences, (2, 0, 3), 9)
    assisted = answer(model, inputs, prompt_lookup_num_tokens=4)
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert error(assisted, greedy) <= TOLERANCE


@pytest.mark.parametrize("name", ["llava/mistral-sliding", "llava/qwen2-ffsss"])
def test_drafts_and_sliding_windows(name: str, drafts) -> None:
    if not V5:
        pytest.skip("this transformers can't crop a cache that is longer than its sliding window")
    model, _, _ = pair(name, CONFIG)
    inputs = make(name, "single")
    greedy = answer(model, inputs)
    drafts(greedy.sequences, (2, 0, 3), 9)
    assisted = answer(model, inputs, prompt_lookup_num_tokens=4)
    assert torch.equal(assisted.sequences, greedy.sequences)
    assert error(assisted, greedy) <= TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_prompt_lookup(name: str, cache: str) -> None:
    if cache == "static" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("this transformers can't crop a static cache")
    model, _, _ = pair(name, CONFIG)
    inputs = make(name, "single")
    greedy = answer(model, inputs)
    static = {CACHE: gap_triton.static_cache(model, max_cache_len=120)} if cache == "static" else {}
    lookup = answer(model, inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **static)
    assert torch.equal(lookup.sequences, greedy.sequences)
    assert error(lookup, greedy) <= TOLERANCE


@pytest.mark.parametrize("pruned", ["model", "assistant", "both"])
def test_a_model_assists_itself(pruned: str) -> None:
    """The cheap way to draft with pruning: what the unpruned model writes, from drafts of the pruned one."""
    inputs = make("llava", "single")
    model = build("llava", "sdpa" if pruned == "assistant" else "gap_triton")
    assistant = build("llava", "sdpa" if pruned == "model" else "gap_triton")
    for candidate in (model, assistant):
        if candidate.config.text_config._attn_implementation == "gap_triton":
            gap_triton.configure(candidate, CONFIG)
    assistant.generation_config.num_assistant_tokens = 3
    # Some releases take no least length next to an assistant, so the stop token must not win by itself.
    options = {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO, EOS]}
    with torch.no_grad():
        greedy = model.generate(**inputs, **options)
        assisted = model.generate(**inputs, **options, assistant_model=assistant)
    assert greedy.shape[1] == inputs["input_ids"].shape[1] + TOKENS
    assert torch.equal(assisted, greedy)


def test_logits_of_the_last_rows_of_a_prompt_that_ends_in_words() -> None:
    """Outside of generate() too, rows behind the first one whose logits are asked for are no part of the prompt."""
    model, _, _ = pair("llava", CONFIG)
    inputs = make("llava", "single")
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[7, 8, BOS]])], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with torch.no_grad():
        model(**inputs)
        alone = gap_triton.last_selection(model).index
        model(**longer, logits_to_keep=4)
        assert torch.equal(gap_triton.last_selection(model).index, alone)
        model(**longer, logits_to_keep=1)
        assert not torch.equal(gap_triton.last_selection(model).index[:, :-3], alone)


def test_logits_of_image_rows_are_logits_of_the_prompt() -> None:
    model, _, _ = pair("llava", CONFIG)
    inputs = make("llava", "single")
    rows = inputs["input_ids"].shape[1]
    with torch.no_grad():
        for logits in (rows, rows - 20):
            part = model(**inputs, logits_to_keep=logits).logits
            assert torch.equal(part, model(**inputs).logits[:, -logits:])
