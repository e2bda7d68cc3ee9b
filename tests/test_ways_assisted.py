"""Assisted decoding and prompt lookup: drafts are no part of the prompt, and rejected ones leave no trace."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_generation import CONFIG, pair
from test_oracle import TOLERANCE, error, make_prompt
from tiny import BOS, EOS, IMAGE, VIDEO, build, generate, prompt

import gap_triton
from gap_triton import GapConfig

MODELS = ["llava", "llava/qwen2"]
BAD = [IMAGE, VIDEO, EOS]


def answer(model, inputs, **options):
    """30 new tokens; assisted decoding needs a stop token, which is never written."""
    return generate(model, inputs, tokens=30, eos_token_id=EOS, **options)


class Forwards:
    """The number of rows of every forward of a model."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.rows: list[int] = []
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs) -> None:
        self.rows.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("ids", ["kept", "compacted", "permuted"])
@pytest.mark.parametrize("name", MODELS)
def test_prompt_lookup_writes_what_greedy_search_writes(name: str, ids: str) -> None:
    model, _, _ = pair(name, GapConfig(keep=0.4, layer=1, ids=ids))
    inputs = make_prompt(name, "single")
    greedy = answer(model, inputs)
    forwards = Forwards(model)
    lookup = answer(model, inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(lookup.sequences, greedy.sequences)
    assert error(lookup, greedy) <= TOLERANCE
    assert max(forwards.rows[1:]) > 1, "nothing was drafted"
    assert len(forwards.rows) < 30, "no draft was accepted"
