"""A decode step takes the masks of later layers from the model's own. What it computes is what is built from positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comparison import error
from support.prompts import BATCHES
from support.tiny import generate
from support.ways import MODELS, build, make
from transformers import DynamicCache, PreTrainedModel

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.arguments import CACHE
from gap_triton.integration import decoder_run, hooks
from gap_triton.kv_cache import kept_tokens

SAME = 1e-6  # of logits: the masks are the same, but where a mask is left out another kernel may run
STAGES = {
    "inside": GapConfig(0.4, 1),
    "twice": GapConfig(0.6, 0, "text", then=(Stage(0.3, 2, "last_token"),)),
    "before": GapConfig(0.4, -1, "random"),
    "before, then inside": GapConfig(0.6, -1, "random", then=(Stage(0.3, 2, "text"),)),
}
CACHES = ["dynamic", "static", "shrunk"]
BATCH_NAMES = [name for name in BATCHES if name != "ends-in-image"] + ["single-ends-in-image"]


def pruned(name: str, config: GapConfig) -> PreTrainedModel:
    model = build(name, "gap_triton")
    gap_triton.configure(model, config)
    return model


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: str, **options: object) -> Any:
    if cache == "static":
        options["cache_implementation"] = "static"
    elif cache == "shrunk":
        options["past_key_values"] = gap_triton.static_cache(model, 160)
    return generate(model, inputs, **options)


def built_from_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "step_of", lambda *_: None)


def refuse_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a step was not taken for a simple one")

    monkeypatch.setattr(hooks, "run_of_step", refuse)
    monkeypatch.setattr(decoder_run, "run_of_step", refuse)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("batch", BATCH_NAMES)
@pytest.mark.parametrize("stages", STAGES)
def test_steps_have_the_masks_that_positions_give(
    stages: str, batch: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is no more room for positions, which is made anew every other step here."""
    model, inputs = pruned("llava", STAGES[stages]), make("llava", batch)
    monkeypatch.setattr(kept_tokens, "ROOM", 2)
    with monkeypatch.context() as patch:
        built_from_positions(patch)
        expected = run(model, inputs, cache)
    refuse_positions(monkeypatch)
    found = run(model, inputs, cache)
    assert torch.equal(found.sequences, expected.sequences)
    assert error(found, expected) <= SAME


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_beams_have_the_masks_that_positions_give(
    name: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples change places between steps."""
    model, inputs = pruned(name, STAGES["twice"]), make(name, "ragged-images")
    with monkeypatch.context() as patch:
        built_from_positions(patch)
        expected = run(model, inputs, cache, num_beams=3)
    refuse_positions(monkeypatch)
    found = run(model, inputs, cache, num_beams=3)
    assert torch.equal(found.sequences, expected.sequences)
    assert error(found, expected) <= SAME


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("stages", STAGES)
def test_a_mask_of_an_unknown_kind_is_built_from_positions(
    stages: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed at the first later layer, when earlier layers have taken the token in."""
    model, inputs = pruned("llava", STAGES[stages]), make("llava", "ragged-images")
    expected = run(model, inputs, cache)
    begun = []
    begin = decoder_run.run_of_step

    def counted(*args: Any) -> Any:
        begun.append(args)
        return begin(*args)

    monkeypatch.setattr(decoder_run, "run_of_step", counted)
    monkeypatch.setattr(hooks, "later_mask_known", lambda *_: False)
    found = run(model, inputs, cache)
    assert len(begun) == 5
    assert torch.equal(found.sequences, expected.sequences)
    assert error(found, expected) <= SAME


@torch.no_grad()
def step_under(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> torch.Tensor:
    """The logits of a step whose mask of four dimensions hides two words of the prompt; None: of one that has no mask."""
    cache = DynamicCache(config=model.config.get_text_config())
    model(**inputs, **{CACHE: cache})
    batch, length = inputs["input_ids"].shape
    seen = torch.ones(batch, 1, 1, length + 1, dtype=torch.bool)
    seen[..., 1] = seen[..., length - 1] = False
    mask: torch.Tensor | None = seen
    if dtype is None:
        mask = None
    elif dtype != torch.bool:
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
    token = torch.full((batch, 1), 7)
    ids = torch.full((batch, 1), length)
    return model(input_ids=token, attention_mask=mask, position_ids=ids, **{CACHE: cache}).logits


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("batch", ["single", "ragged-images"])
def test_a_mask_of_four_dimensions_hides_what_it_says(
    batch: str, stages: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = pruned("llava", STAGES[stages]), make("llava", batch)
    with monkeypatch.context() as patch:
        built_from_positions(patch)
        expected = step_under(model, inputs, dtype)
        unhidden = step_under(model, inputs, None)
    refuse_positions(monkeypatch)
    assert float((expected - unhidden).abs().max()) > 1e-3
    assert float((step_under(model, inputs, dtype) - expected).abs().max()) <= SAME
