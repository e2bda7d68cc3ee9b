"""A layer that is asked before it is called keeps all that others look at: its name, its class, its forward, its hooks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.hooks import hooks
from support.prompts import make_prompt
from support.tiny import build
from torch import nn

import gap_triton
from gap_triton import GapConfig
from gap_triton.arguments import STATE_KEY
from gap_triton.integration.layer_calls import carries, put_before
from gap_triton.state import ForwardState

CONFIG = GapConfig(keep=0.4, layer=1)


def test_a_layer_has_the_class_that_it_had_and_gets_it_back() -> None:
    model = build("llava", "sdpa")
    layer = model.model.language_model.layers[2]
    own = type(layer)
    gap_triton.attach(model, CONFIG)
    assert isinstance(layer, own)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "forward"):
        assert getattr(type(layer), name) == getattr(own, name)
    assert not layer._forward_pre_hooks
    gap_triton.detach(model)
    assert type(layer) is own
    assert hooks(model) == 0


def test_all_hooks_on_a_later_layer_see_what_it_gets() -> None:
    """Whether they were there before pruning was attached or not."""
    model, inputs, seen = build("llava", "sdpa"), make_prompt("llava", "left-padded"), []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].shape[1])

    layer = model.model.language_model.layers[2]
    with layer.register_forward_pre_hook(look), torch.no_grad():
        gap_triton.attach(model, CONFIG)
        with layer.register_forward_pre_hook(look):
            model(**inputs)
    assert len(seen) == 2
    assert seen[0] == seen[1] < inputs["input_ids"].shape[1]


class Layer(nn.Module):
    """Gives back what it is called with."""

    def forward(self, x: int, **kwargs: Any) -> tuple[int, dict[str, Any]]:
        return x, kwargs


def one_more(layer: nn.Module, args: tuple[int], kwargs: dict[str, Any]) -> tuple[tuple[int], dict[str, Any]]:
    return (args[0] + 1,), {**kwargs, "of": layer}


def state(passes: bool = False) -> ForwardState:
    return ForwardState(None, None, None, None, passes=passes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "asked"),
    [
        ({}, False),
        ({STATE_KEY: None}, False),
        ({STATE_KEY: state()}, True),
        ({STATE_KEY: state(passes=True)}, False),
        ({STATE_KEY: state(passes=True), "attention_mask": 0}, True),
    ],
)
def test_a_layer_is_asked_where_it_may_need_something(kwargs: dict[str, Any], asked: bool) -> None:
    layer = Layer()
    call = put_before(layer, one_more)
    assert layer(1, **kwargs) == ((2, {**kwargs, "of": layer}) if asked else (1, kwargs))
    call.remove()
    assert layer(1, **kwargs) == (1, kwargs)
    assert type(layer) is Layer


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copy_is_asked_itself(duplicate: Any) -> None:
    layer = Layer()
    call = put_before(layer, one_more)
    twin = duplicate(layer)
    call.remove()
    assert carries(twin)
    assert isinstance(twin, Layer)
    assert twin(1, **{STATE_KEY: state()})[1]["of"] is twin


def test_a_class_that_was_made_since_stays() -> None:
    """As sharded data parallelism makes one of each layer's class."""
    layer = Layer()
    call = put_before(layer, one_more)
    layer.__class__ = sharded = type("ShardedLayer", (type(layer),), {})
    asked = {STATE_KEY: state()}
    assert layer(1, **asked)[0] == 2
    assert type(copy.deepcopy(layer)) is sharded
    call.remove()
    assert type(layer) is sharded
    assert layer(1, **asked)[0] == 1
    again = put_before(layer, one_more)
    assert layer(1, **asked)[0] == 2  # once, not twice
    again.remove()
    assert layer(1, **asked)[0] == 1
