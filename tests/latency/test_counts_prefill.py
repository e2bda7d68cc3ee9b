"""What a prefill asks of a device beyond one without pruning: launches, reads and copies that the host waits for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.embedded import MODELS, Added, added, first_token, load
from support.methods import preset
from support.prompts import make_prompt
from support.tiny import build
from support.ways import V5

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.prefill import plan
from gap_triton.presets import PRESETS

LAYERS = 6  # of both models
# At most so many launches.
DEFAULT = 3
RECOMMENDED = 13
LIMITS = {
    "fastv": 3,
    "pyramiddrop": 9,
    "sparsevlm": 11,
    "sparsevlm+": 17,
    "feather": 12,
    # Before the decoder.
    "random": 4,
    "spatial": 4,
    "cls": 7,
    "text": 5,
    "trim": 14,
    "nuwa": 19,
    "prumerge": 14,
    "visionzip": 17,
    "prumerge+": 16,
    "fastervlm": 7,
    "swiftvlm": 9,
    "divprune": 7,
    "scope": 14,
    "cdpruner": 17,
    "dart": 15,
    "vispruner": 11,
    "hiprune": 14,
    "vscan": 18,
}
# These ask where a visual token stands, or record a vision encoder of the second model, and so ask for sizes of its images:
# one launch more puts them beside the prompt's numbers, so that one read is for both.
ASK_FOR_SIZES = {"feather", "spatial", "cls", "nuwa", "prumerge", "visionzip", "prumerge+"} | {
    *("scope", "fastervlm", "vispruner", "hiprune", "vscan")
}
GOAL = 20
WAYS = pytest.mark.parametrize("prepared", [False, True], ids=["as it comes", "prepared"])
ON_BOTH = pytest.mark.parametrize("model", MODELS)


def assert_within(found: Added, limit: Added) -> None:
    assert all(one <= most for one, most in zip(found, limit, strict=True)), (found, limit)


@WAYS
@ON_BOTH
def test_keeping_everything_adds_nothing(model: str, prepared: bool) -> None:
    for config in (GapConfig(1.0), GapConfig(1.0, -1, "random", then=(Stage(1.0, 2, "text"),))):
        assert added(model, config, prepared) == (0, 0, 0)


@WAYS
@ON_BOTH
def test_the_default_adds_few_launches(model: str, prepared: bool) -> None:
    assert_within(added(model, GapConfig(0.25), prepared), Added(DEFAULT, not prepared, 0))


@WAYS
@ON_BOTH
def test_what_is_recommended_adds_some_more(model: str, prepared: bool) -> None:
    config = replace(gap_triton.RECOMMENDED, keep=0.25)
    assert_within(added(model, config, prepared), Added(RECOMMENDED, not prepared, 0))


@WAYS
@ON_BOTH
def test_batches_that_keep_equally_many_add_few_launches(model: str, prepared: bool) -> None:
    assert_within(added(model, GapConfig(0.25), prepared, batch=3), Added(3 * DEFAULT, not prepared, 0))


@WAYS
@ON_BOTH
@pytest.mark.parametrize("coverage", ["region", "stride"])
def test_a_choice_by_places_in_the_image_launches_no_more(coverage: str, model: str, prepared: bool) -> None:
    """Than the default: where tokens stand follows from sizes, and the choice is in the operator that scores."""
    together = not prepared and model != "llava"
    config = GapConfig(0.25, 1, "last_token", coverage)
    assert_within(added(model, config, prepared), Added(DEFAULT + together, not prepared, 0))


def test_every_preset_has_a_limit() -> None:
    assert set(LIMITS) == set(PRESETS)


def test_no_preset_launches_more_than_twenty_kernels() -> None:
    assert all(limit + (name in ASK_FOR_SIZES) <= GOAL for name, limit in LIMITS.items())


@WAYS
@ON_BOTH
@pytest.mark.parametrize("name", PRESETS)
def test_presets_add_no_more_than_their_limit(name: str, model: str, prepared: bool) -> None:
    loaded = load(model)
    config = preset(name, loaded.config.get_text_config().num_hidden_layers, model == "llava")
    together = not prepared and model != "llava" and name in ASK_FOR_SIZES
    assert_within(added(model, config, prepared), Added(LIMITS[name] + together, not prepared, 0))


@WAYS
@ON_BOTH
@pytest.mark.parametrize("name", ["fastv", "feather", "spatial", "cls"])
def test_generate_reads_no_more(name: str, model: str, prepared: bool) -> None:
    """Than a forward, though it encodes images ahead. Windows of a recorded encoder are read there by themselves."""
    found = added(model, preset(name, LAYERS, model == "llava"), prepared, run=first_token)
    windows = V5 and name == "cls" and model != "llava"
    assert found.reads == (0 if prepared else 1 + windows)
    assert found.copies == 0


def test_a_ragged_batch_adds_one_copy_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many stages there are: how much each of them keeps of each sample goes over in one tensor."""
    sent = []
    monkeypatch.setattr(
        plan, "to_device", lambda values, device: sent.append(values) or torch.tensor(values).to(device)
    )
    model = build("llava_next")
    gap_triton.attach(
        model, GapConfig(0.6, 0, "text", then=(Stage(0.5, 1, "text"), Stage(0.2, 2, "last_token")))
    )
    with torch.no_grad():
        model(**make_prompt("llava_next", "ragged-images"))
    assert len(sent) == 1
    assert [len(set(keep)) > 1 for keep in sent[0]] == [True] * 3
