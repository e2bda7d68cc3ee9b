"""Decoders that are handed the survivors alone: recurrent, convolving, choosing what they attend to, sharing keys."""

from __future__ import annotations

import pytest
import torch
from support import families, model_types
from support.comparison import TOLERANCE, error
from support.installed_types import build_or_skip
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle, core_of
from support.survivors import SurvivorsOracle
from support.tiny import generate
from transformers import PreTrainedModel

import gap_triton
from gap_triton import GapConfig
from gap_triton.integration import survivors_only

TOKENS = 4
CONFIG = GapConfig(keep=0.4, layer=-1, score="random")
RANDOM_WORDS = 150  # ids from here on are placeholders, which `generate` is told not to write
BY_SURVIVORS = tuple(name for name in model_types.BEFORE_ONLY if name != "gemma4_unified")

Inputs = dict[str, torch.Tensor]


def pruned_by(model: PreTrainedModel, inputs: Inputs, config: GapConfig = CONFIG, **options: object):
    """What the pruned model generates, and which rows of the prompt stay, [B, Q] bool."""
    with families.visual_features(model), gap_triton.pruning(model, config):
        output = generate(model, inputs, tokens=TOKENS, **options)
        selection = gap_triton.last_selection(model)
    return output, stays_of(selection, inputs["attention_mask"])


def stays_of(selection: gap_triton.Selection, mask: torch.Tensor) -> torch.Tensor:
    stays = torch.zeros(*mask.shape, dtype=torch.bool)
    for sample, rows in enumerate(selection.index.tolist()):
        stays[sample, [row for row in rows if row >= 0]] = True
    assert bool((mask.bool() & ~stays).any(dim=1).all())
    return stays & mask.bool()


def with_answer(model: PreTrainedModel, inputs: Inputs, sequences: torch.Tensor) -> Inputs:
    """The prompt and what was generated after it as one input, with the ids that `generate` gives them."""
    batch, prompt = inputs["input_ids"].shape
    answer = sequences.shape[1] - prompt

    def extended(value: torch.Tensor, by: int) -> torch.Tensor:
        whole = value.shape[:2] == (batch, prompt)
        return torch.nn.functional.pad(value, (0, answer), value=by) if whole else value

    whole = {name: extended(value, int(name == "attention_mask")) for name, value in inputs.items()}
    if not hasattr(core_of(model)[0], "get_rope_index"):
        whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**whole, "input_ids": sequences}


def expected_of(
    model_type: str, inputs: Inputs, sequences: torch.Tensor, stays: torch.Tensor | None
) -> list[torch.Tensor]:
    """Logits of each generated token by the plain decoder on the survivors alone; of all tokens where ``stays`` is None."""
    reference = build_or_skip(model_type)
    prompt = inputs["input_ids"].shape[1]
    whole = with_answer(reference, inputs, sequences)
    if stays is None:
        stays = inputs["attention_mask"].bool()
    stays = torch.nn.functional.pad(stays, (0, sequences.shape[1] - prompt), value=True)
    with torch.no_grad(), families.visual_features(reference), SurvivorsOracle(reference, stays, prompt):
        logits = reference(**whole).logits
    return list(logits[:, prompt - 1 : -1].unbind(1))


def difference(output, expected: list[torch.Tensor]) -> float:
    pairs = zip(output.logits, expected, strict=True)
    return max(float((a - b)[:, :RANDOM_WORDS].abs().max()) for a, b in pairs)


@pytest.mark.parametrize("model_type", BY_SURVIVORS)
def test_dropping_equals_a_prompt_without_the_dropped_tokens(model_type: str) -> None:
    """Images in both samples of a left-padded batch, of which as many are left: filler, a cache and steps, against none."""
    model = build_or_skip(model_type)
    inputs = families.prompt(model)
    with families.visual_features(model):
        dense = generate(model, inputs, tokens=TOKENS)
    everything, _ = everything_kept_by(model, inputs)
    assert torch.equal(everything.sequences, dense.sequences)
    assert error(everything, dense) == 0.0
    pruned, stays = pruned_by(model, inputs)
    assert difference(pruned, expected_of(model_type, inputs, pruned.sequences, stays)) <= TOLERANCE
    # Guards the line above: a model that drops nothing, next to an oracle that drops nothing, would agree too.
    assert difference(pruned, expected_of(model_type, inputs, pruned.sequences, None)) > 100 * TOLERANCE


def everything_kept_by(model: PreTrainedModel, inputs: Inputs):
    with families.visual_features(model), gap_triton.pruning(model, GapConfig(1.0, -1, "random")):
        return generate(model, inputs, tokens=TOKENS), gap_triton.last_selection(model)


@pytest.mark.parametrize("model_type", model_types.MASKED)
def test_dropping_equals_masking(model_type: str) -> None:
    model, reference = build_or_skip(model_type), build_or_skip(model_type)
    inputs = families.prompt(model)
    pruned, stays = pruned_by(model, inputs)
    core_of(reference)[1].set_attn_implementation(ORACLE)
    gone = inputs["attention_mask"].bool() & ~stays
    with families.visual_features(reference), MaskingOracle(reference, -1, 0.4, "random", gone):
        expected = generate(reference, inputs, tokens=TOKENS)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE


# --------------------------------------------------------------------------------------------- broken on purpose
def compacted(name: str, value: object, shortened: object) -> object:
    """The survivors' ids without gaps."""
    if name != "position_ids":
        return shortened
    return torch.arange(shortened.shape[-1]).expand_as(shortened)


def first_rows(name: str, value: object, shortened: object) -> object:
    """Inputs of each layer by number and not by token."""
    per_layer = name in ("per_layer_inputs", "ple_input_ids") and value is not None
    return value[:, : shortened.shape[1]] if per_layer else shortened


def change_taken(monkeypatch: pytest.MonkeyPatch, change) -> None:
    take = survivors_only.take_survivors
    monkeypatch.setattr(
        survivors_only,
        "take_survivors",
        lambda rows, survivors, name, value: change(name, value, take(rows, survivors, name, value)),
    )


def change_mask(monkeypatch: pytest.MonkeyPatch, change) -> None:
    make = survivors_only._mask_of_held
    monkeypatch.setattr(survivors_only, "_mask_of_held", lambda *args: change(make(*args)))


def by_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, chunks and distances count what is left."""
    monkeypatch.setattr("gap_triton.integration.hooks.hand_positions", lambda *args: None)


BROKEN = {
    "ids without gaps": lambda patch: change_taken(patch, compacted),
    "inputs of layers not gathered": lambda patch: change_taken(patch, first_rows),
    "filler is seen": lambda patch: change_mask(patch, torch.ones_like),
    "places in the cache": by_places,
}
KINDS = {
    "linear attention": ("qwen3_5", ("ids without gaps", "filler is seen")),
    "state space": ("nemotron_h_omni", ("filler is seen",)),
    "convolution": ("lfm2_vl", ("ids without gaps", "filler is seen")),
    "window": ("lfm3_vl", ("ids without gaps", "filler is seen", "places in the cache")),
    "chunk": ("llama4", ("ids without gaps", "filler is seen", "places in the cache")),
    "shared keys": ("gemma4", ("ids without gaps", "inputs of layers not gathered", "places in the cache")),
    "index": ("mistral_large4", ("ids without gaps", "filler is seen")),
    "index and inputs of layers": ("qwen4_exp", ("ids without gaps", "inputs of layers not gathered")),
    "distance": ("inkling2", ("filler is seen", "places in the cache")),
}


@pytest.mark.parametrize(
    ("kind", "fault"), [(kind, fault) for kind, (_, faults) in KINDS.items() for fault in faults]
)
def test_each_kind_of_layer_shows_a_broken_mechanism(
    kind: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would say if the mechanism were broken: another answer, and not just rounding."""
    model = build_or_skip(KINDS[kind][0])
    inputs = families.prompt(model)
    right, stays = pruned_by(model, inputs)
    BROKEN[fault](monkeypatch)
    wrong, stay_too = pruned_by(model, inputs)
    assert torch.equal(stays, stay_too)
    assert difference(wrong, right.logits) > 100 * TOLERANCE
