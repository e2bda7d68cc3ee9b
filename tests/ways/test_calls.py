"""A call keeps the configuration that it started with, and its hooks, whatever happens to the model meanwhile."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from support.comparison import same
from support.hooks import attributes, hooks
from support.prompts import make_prompt
from support.tiny import LAYERS, build, generate
from support.ways import V5

import gap_triton
from gap_triton import GapConfig, Stage

CONFIGS = {
    "inside": GapConfig(keep=0.4, layer=1),
    "compacted": GapConfig(keep=0.3, layer=2, ids="compacted"),
    "before": GapConfig(
        keep=0.6, layer=-1, score="cls", coverage="region", merge="aggregation", then=(Stage(0.3, 2),)
    ),
}
MODULES = (
    "",
    "model",
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model",
    *(f"model.language_model.layers.{index}" for index in range(LAYERS)),
)
Action = Callable[[], object]


@contextmanager
def at(model: torch.nn.Module, name: str, when: str, action: Action, call: int = 1) -> Iterator[None]:
    """Run ``action`` at the ``call``-th call of module ``name``, before all other hooks or behind them."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            action()

    module = model.get_submodule(name)
    register = module.register_forward_hook
    if when == "before":
        register = functools.partial(module.register_forward_pre_hook, prepend=True)
    with register(hook):
        yield
    assert calls >= call


def elsewhere(action: Action) -> Action:
    """``action`` in another thread, waited for."""

    def run() -> None:
        failed: list[BaseException] = []

        def catch() -> None:
            try:
                action()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=catch)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    return run


def attached(config: GapConfig) -> transformers.PreTrainedModel:
    model = build("llava", "sdpa")
    gap_triton.attach(model, config)
    return model


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return make_prompt("llava", "left-padded")


@pytest.fixture(scope="module")
def expected(inputs: dict[str, torch.Tensor]) -> dict[str, object]:
    outputs = {name: generate(attached(config), inputs, tokens=3) for name, config in CONFIGS.items()}
    outputs["dense"] = generate(build("llava", "sdpa"), inputs, tokens=3)
    return outputs


@pytest.mark.parametrize(
    ("first", "second"), [("compacted", "before"), ("before", "compacted"), ("inside", "before")]
)
def test_a_generation_that_is_reconfigured(first: str, second: str, inputs, expected) -> None:
    model = attached(CONFIGS[first])
    for name in MODULES:
        for when in ("before", "behind"):
            gap_triton.configure(model, CONFIGS[first])
            with at(model, name, when, lambda: gap_triton.configure(model, CONFIGS[second])):
                assert same(generate(model, inputs, tokens=3), expected[first]), (name, when)
    assert same(generate(model, inputs, tokens=3), expected[second])


def test_a_generation_that_is_reconfigured_while_it_decodes(inputs, expected) -> None:
    model = attached(CONFIGS["compacted"])
    step = at(
        model, "model.language_model", "before", lambda: gap_triton.configure(model, CONFIGS["before"]), 2
    )
    with step:
        assert same(generate(model, inputs, tokens=3), expected["compacted"])


@pytest.mark.parametrize("name", MODULES)
def test_a_forward_that_is_reconfigured(name: str, inputs) -> None:
    """It is one call; what a hook in front of all others sets is what it starts with."""
    model = attached(CONFIGS["compacted"])
    with torch.no_grad():
        logits = {}
        for key in ("before", "compacted"):
            gap_triton.configure(model, CONFIGS[key])
            logits[key] = model(**inputs).logits
        with at(model, name, "before", lambda: gap_triton.configure(model, CONFIGS["before"])):
            found = model(**inputs).logits
    assert torch.equal(found, logits["compacted" if name else "before"])


@pytest.mark.parametrize("name", MODULES)
def test_a_generation_in_one_thread_and_a_configuration_in_another(name: str, inputs, expected) -> None:
    model = attached(CONFIGS["inside"])
    other: list[object] = []

    def reconfigure_and_run() -> None:
        gap_triton.configure(model, CONFIGS["before"])
        other.append(generate(model, inputs, tokens=3))

    with at(model, name, "before", elsewhere(reconfigure_and_run)):
        assert same(generate(model, inputs, tokens=3), expected["inside"])
    assert same(other[0], expected["before"])


@pytest.mark.parametrize("call", [1, 2], ids=["prefill", "decode"])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("key", ["compacted", "before"])
def test_a_generation_from_which_pruning_is_detached(
    key: str, where: str, call: int, inputs, expected
) -> None:
    """It runs to its end under the hooks; calls that begin meanwhile are dense; then nothing is left."""
    for name in MODULES if call == 1 else MODULES[-2:]:
        model = build("llava", "sdpa")
        generate(model, inputs, tokens=1)  # transformers puts hooks of its own on it
        before = attributes(model)
        gap_triton.attach(model, CONFIGS[key])
        other: list[object] = []

        def detach_and_run(model=model, other=other) -> None:
            gap_triton.detach(model)
            assert gap_triton.last_selection(model) is None
            other.append(generate(model, inputs, tokens=3))

        action = (
            elsewhere(detach_and_run)
            if where == "elsewhere"
            else lambda model=model: gap_triton.detach(model)
        )
        with at(model, name, "before", action, call):
            assert same(generate(model, inputs, tokens=3), expected[key]), name
        assert all(same(each, expected["dense"]) for each in other)
        assert hooks(model) == 0
        assert attributes(model) == before
        assert model.config.text_config._attn_implementation == "sdpa"
        assert same(generate(model, inputs, tokens=3), expected["dense"])


@pytest.mark.parametrize("name", MODULES)
def test_a_generation_to_which_pruning_is_attached(name: str, inputs, expected) -> None:
    model = build("llava", "sdpa")
    with at(model, name, "before", lambda: gap_triton.attach(model, CONFIGS["before"])):
        assert same(generate(model, inputs, tokens=3), expected["dense"])
    assert same(generate(model, inputs, tokens=3), expected["before"])


@pytest.mark.parametrize("name", MODULES)
def test_a_forward_from_which_pruning_is_detached(name: str, inputs) -> None:
    model = attached(CONFIGS["compacted"])
    with torch.no_grad():
        pruned = model(**inputs).logits
        with at(model, name, "before", elsewhere(lambda: gap_triton.detach(model))):
            found = model(**inputs).logits
        dense = build("llava", "sdpa")(**inputs).logits
        assert hooks(model) == 0
        # Until the module that reads the prompt has been called, nothing of the call is under way.
        assert torch.equal(found, dense if name in ("", "model") else pruned)


def test_pruning_is_attached_again_before_the_last_call_has_ended(inputs, expected) -> None:
    model = attached(CONFIGS["compacted"])

    def off_and_on() -> None:
        gap_triton.detach(model)
        gap_triton.attach(model, CONFIGS["inside"])

    with at(model, MODULES[-1], "before", off_and_on):
        assert same(generate(model, inputs, tokens=3), expected["compacted"])
    assert same(generate(model, inputs, tokens=3), expected["inside"])
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", MODULES)
def test_a_generation_whose_model_is_switched_to_another_name(name: str, inputs) -> None:
    """The name is another's to give, so it counts at once, and a generation that has begun can't go on."""
    model = build("llava", "gap_triton")
    gap_triton.configure(model, CONFIGS["compacted"])
    sentence = "goes on in a model that does not prune now|ran without calling the attention function"
    dense = generate(build("llava", "sdpa"), inputs, tokens=3)
    # Nothing has been pruned yet before the module that reads the prompt; transformers 5 encodes images ahead of it.
    unpruned = name in ("", "model") or (V5 and name in ("model.vision_tower", "model.multi_modal_projector"))
    with at(model, name, "before", elsewhere(lambda: model.set_attn_implementation("sdpa"))):
        if unpruned:
            assert same(generate(model, inputs, tokens=3), dense)
        else:
            with pytest.raises((ValueError, RuntimeError), match=sentence):
                generate(model, inputs, tokens=3)
    assert hooks(model) == 0
    assert same(generate(model, inputs, tokens=3), dense)


def test_a_forward_that_fails_holds_nothing_back(inputs) -> None:
    model = attached(CONFIGS["before"])

    def fail() -> None:
        raise KeyError("somewhere")

    for call in (lambda: model(**inputs), lambda: generate(model, inputs)):
        with pytest.raises(KeyError), at(model, MODULES[-1], "before", fail), torch.no_grad():
            call()
    gap_triton.detach(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("where", ["here", "in a thread that ended"])
def test_a_forward_that_is_interrupted_holds_nothing_back(where: str, inputs, expected) -> None:
    """Torch runs no hooks after a KeyboardInterrupt, which is no Exception."""
    model = attached(CONFIGS["before"])

    def interrupt() -> None:
        raise KeyboardInterrupt

    for call in (lambda: model(**inputs), lambda: generate(model, inputs)):
        with pytest.raises(KeyboardInterrupt), at(model, MODULES[-1], "before", interrupt), torch.no_grad():
            call() if where == "here" else elsewhere(call)()
    assert same(generate(model, inputs, tokens=3), expected["before"])
    gap_triton.detach(model)
    assert hooks(model) == 0
    assert same(generate(model, inputs, tokens=3), expected["dense"])
