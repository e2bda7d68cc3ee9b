"""Methods on models under autocast, in float64, and where float64 is the default dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import gap_kernels
import pytest
import torch
from support import ways
from support.default_dtype import float64_by_default
from support.methods import NAMES, method
from support.tiny import LAYERS, generate
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

import gap_triton
from gap_triton import Selection, strategies

TOLERANCE = 2e-4
"""Between logits of a float32 and a float64 run of the tiny models; measured 3e-5."""
OURS = {
    getattr(package, name): name
    for package in (gap_kernels, strategies)
    for name in package.__all__
    if callable(getattr(package, name)) and name[0].islower() and name != "backend"
}


def pruned(name: str, model_name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A model that prunes by the method ``name``, and a prompt for it."""
    model = ways.build(model_name, "gap_triton").to(dtype)
    gap_triton.configure(model, method(name, LAYERS, cls=model_name == "llava"))
    inputs = ways.make(model_name, "ragged-images")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return model, inputs


def stages(selection: Selection) -> list[Selection]:
    """What every stage kept, the first one first."""
    before = [] if selection.before is None else stages(selection.before)
    return [*before, selection]


def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Selection]]:
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    selection = gap_triton.last_selection(model)
    assert selection is not None
    return logits, stages(selection)


def assert_same_choice(found: list[Selection], expected: list[Selection]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.position_ids, other.position_ids)
        assert one.score.dtype == torch.float32


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Callable[..., Any], Any, Any, Any]]:
    """What gap_triton calls of gap_kernels and strategies, with what, and what it got."""
    found: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            kept = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs, result))
            found.append((function, *kept))
            return result

        return run

    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("gap_triton."):
            for name, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in OURS:
                    monkeypatch.setattr(module, name, noting(value))
    return found


@pytest.mark.parametrize("model_name", ways.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_off_in_what_we_own(name: str, model_name: str, calls: list[Any]) -> None:
    """The model computes as autocast has it; from what it gives us, we choose what we choose without autocast."""
    model, inputs = pruned(name, model_name)
    with torch.autocast("cpu", torch.bfloat16):
        logits, found = forward(model, inputs)
    visual = left = (inputs["input_ids"] == ways.IMAGE).sum(1).tolist()
    for stage, selection in zip(method(name, LAYERS, model_name == "llava").stages, found, strict=True):
        left = [stage.count(count) for count in (left if stage.share_of == "left" else visual)]
        assert (selection.visual_index >= 0).sum(1).tolist() == left
        assert selection.score.dtype == torch.float32
    assert logits.isfinite().all()
    assert calls
    for function, args, kwargs, result in calls:
        expected = tree_leaves(function(*args, **kwargs))
        for one, other in zip(tree_leaves(result), expected, strict=True):
            assert type(one) is type(other), OURS[function]
            if isinstance(one, Tensor):
                assert one.dtype == other.dtype, OURS[function]
                assert torch.equal(one, other), OURS[function]


@pytest.mark.parametrize("model_name", ways.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_a_float64_model_chooses_as_in_float32(name: str, model_name: str) -> None:
    logits, chosen = forward(*pruned(name, model_name, torch.float64))
    expected, wanted = forward(*pruned(name, model_name))
    assert_same_choice(chosen, wanted)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model_name", ways.MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_float64_by_default_changes_nothing(name: str, model_name: str) -> None:
    model, inputs = pruned(name, model_name)
    expected, wanted = forward(model, inputs)
    with float64_by_default():
        _, chosen = forward(model, inputs)
    assert_same_choice(chosen, wanted)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("model_name", ways.MODELS)
def test_keeping_everything_under_autocast_is_sdpa(model_name: str) -> None:
    model, inputs = pruned("fastv", model_name)
    plain = ways.build(model_name)
    with torch.autocast("cpu", torch.bfloat16):
        gap_triton.configure(model, gap_triton.GapConfig(1.0, 1))
        found, expected = generate(model, inputs), generate(plain, inputs)
        for one, other in zip(found.logits, expected.logits, strict=True):
            assert torch.equal(one, other)
        gap_triton.configure(model, method("fastv", LAYERS, cls=False))
        assert all(step.isfinite().all() for step in generate(model, inputs).logits)
