"""A layer that is asked before it is called keeps all that others look at: its name, its class, its forward, its hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hooks import hooks
from support.prompts import make_prompt
from support.tiny import LAYERS, build
from torch import nn
from transformers import DynamicCache

import gap_triton
from gap_triton import GapConfig
from gap_triton.arguments import CACHE, STATE_KEY
from gap_triton.attachment import attachment_of
from gap_triton.integration.layer_calls import carries, put_before
from gap_triton.state import ForwardState

CONFIG = GapConfig(keep=0.4, layer=1)
EVERYTHING = GapConfig(keep=1.0)


def layers_that_carry(model: nn.Module) -> int:
    return sum(map(carries, model.model.language_model.layers))


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Two samples that keep different numbers, so that every later step needs a mask."""
    return make_prompt("llava", "ragged-images")


@pytest.fixture(scope="module")
def expected(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the prompt and of a step behind it."""
    model = build("llava", "sdpa")
    gap_triton.attach(model, CONFIG)
    return torch.cat(prompt_and_step(model, inputs), dim=1)


@torch.no_grad()
def prompt_and_step(
    model: Any, inputs: dict[str, torch.Tensor], between: Callable[[], object] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = DynamicCache(config=model.config.get_text_config())
    prompt = model(**inputs, **{CACHE: cache}).logits
    between()
    mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    ids = mask.sum(dim=1, keepdim=True) - 1
    token = torch.full((len(mask), 1), 7)
    return prompt, model(input_ids=token, attention_mask=mask, position_ids=ids, **{CACHE: cache}).logits


def test_nothing_is_on_layers_where_everything_is_kept() -> None:
    model = build("llava", "sdpa")
    gap_triton.attach(model, EVERYTHING)
    assert layers_that_carry(model) == 0
    gap_triton.configure(model, CONFIG)
    assert layers_that_carry(model) == LAYERS
    with gap_triton.pruning(model, EVERYTHING):
        assert layers_that_carry(model) == 0
        with gap_triton.pruning(model, CONFIG):
            assert layers_that_carry(model) == LAYERS
        assert layers_that_carry(model) == 0
    assert layers_that_carry(model) == LAYERS
    gap_triton.configure(model, EVERYTHING)
    assert layers_that_carry(model) == 0
    gap_triton.detach(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("when", ["before the step", "in the prompt"])
def test_a_pruned_cache_goes_on_where_everything_is_kept(
    when: str, inputs: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    """The call that runs, and the cache that it has pruned, get what they need; afterwards nothing is left on the layers."""
    model = build("llava", "sdpa")
    gap_triton.attach(model, CONFIG)

    def keep_everything(*_: object) -> None:
        gap_triton.configure(model, EVERYTHING)

    if when == "in the prompt":
        with model.model.language_model.layers[0].register_forward_pre_hook(keep_everything):
            found = prompt_and_step(model, inputs)
    else:
        found = prompt_and_step(model, inputs, keep_everything)
    assert torch.equal(torch.cat(found, dim=1), expected)
    assert layers_that_carry(model) == 0


def test_a_prompt_that_began_before_everything_was_kept(
    inputs: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    """Its hooks were taken off right before it was seen to be running."""
    model = build("llava", "sdpa")
    gap_triton.attach(model, CONFIG)
    attachment = attachment_of(model.model.language_model)

    def take_off(*_: object) -> None:
        running, attachment.running = attachment.running, {}
        gap_triton.configure(model, EVERYTHING)
        assert layers_that_carry(model) == 0
        attachment.running = running

    with model.model.multi_modal_projector.register_forward_pre_hook(take_off):
        prompt, step = prompt_and_step(model, inputs)
    assert torch.equal(torch.cat([prompt, step], dim=1), expected)


def test_what_was_compiled_where_everything_is_kept_prunes_when_it_is_to(
    inputs: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    model, rows = build("llava", "sdpa"), inputs["input_ids"].shape[1]
    with torch.no_grad():
        dense = model(**inputs).logits
        gap_triton.attach(model, EVERYTHING)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(**inputs).logits, dense, atol=1e-5)
        gap_triton.configure(model, CONFIG)
        assert torch.allclose(compiled(**inputs).logits, expected[:, :rows], atol=1e-5)
    torch._dynamo.reset()


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


def test_all_hooks_on_a_later_layer_see_what_it_gets(inputs: dict[str, torch.Tensor]) -> None:
    """Whether they were there before pruning was attached or not."""
    model, seen = build("llava", "sdpa"), []

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
