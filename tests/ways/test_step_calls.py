"""A decode step passes the hooks of torch on a module where all are ours and have nothing to do. Elsewhere it runs them."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from support.hooks import hooks
from support.prompts import make_prompt
from support.tiny import build
from torch import nn
from transformers import DynamicCache

import gap_triton
from gap_triton import GapConfig
from gap_triton.arguments import CACHE
from gap_triton.attachment import attachment_of
from gap_triton.integration.own_class import BASE
from gap_triton.kv_cache.kept_tokens import step_left

CONFIGS = {
    "keep": GapConfig(keep=1.0),
    "drop": GapConfig(keep=0.4, layer=1),
    "before": GapConfig(0.4, -1, "cls"),
}
MODULES = {"head": "", "owner": "model", "decoder": "model.language_model"}
OURS = ("before_head", "before_owner", "before_text", "after_text", "after_owner")


class Conversation:
    """A prompt of one sample, and steps behind it."""

    def __init__(self, config: GapConfig | None, model: Any = None) -> None:
        self.model = build("llava", "sdpa") if model is None else model
        if config is not None:
            gap_triton.attach(self.model, config)
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        inputs = make_prompt("llava", "single")
        self.length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            self.model(**inputs, **{CACHE: self.cache})

    @torch.no_grad()
    def step(self, model: Any = None) -> torch.Tensor:
        """One more token; returns its logits."""
        model = self.model if model is None else model
        ids = torch.full((1, 1), self.length)
        self.length += 1
        return model(input_ids=torch.full((1, 1), 7), position_ids=ids, **{CACHE: self.cache}).logits

    def module(self, name: str) -> Any:
        return self.model.get_submodule(MODULES[name])


@pytest.fixture(scope="module")
def expected() -> dict[str, list[torch.Tensor]]:
    """The logits of two steps, through the hooks: somebody else has one on each module."""
    found = {}
    for name, config in CONFIGS.items():
        conversation = Conversation(config)
        with ExitStack() as others:
            for each in MODULES:
                others.enter_context(conversation.module(each).register_forward_hook(lambda *_: None))
            found[name] = [conversation.step(), conversation.step()]
    return found


def names_called(function: Callable[[], object]) -> list[str]:
    """The names of the functions of Python that ``function`` calls."""
    names: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_runs_no_hook_of_ours(name: str, expected: dict[str, list[torch.Tensor]]) -> None:
    conversation, found = Conversation(CONFIGS[name]), []
    names = names_called(lambda: found.append(conversation.step()))
    assert not set(OURS) & set(names)
    assert torch.equal(found[0], expected[name][0])
    assert torch.equal(conversation.step(), expected[name][1])
    assert step_left(conversation.cache) is None
    assert not attachment_of(conversation.model.model).running


@contextmanager
def looking(module: nn.Module, how: str, seen: list[object]) -> Iterator[None]:
    """Somebody else's hook on ``module``, or on all modules."""

    def look(each: nn.Module, *_: object) -> None:
        if each is module:
            seen.append(each)

    put = {
        "before": module.register_forward_pre_hook,
        "behind": module.register_forward_hook,
        "before all": nn.modules.module.register_module_forward_pre_hook,
        "behind all": nn.modules.module.register_module_forward_hook,
    }[how]
    with put(look):
        yield


@pytest.mark.parametrize("how", ["before", "behind", "before all", "behind all"])
@pytest.mark.parametrize("where", MODULES)
@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_of_others_see_every_step(
    name: str, where: str, how: str, expected: dict[str, list[torch.Tensor]]
) -> None:
    conversation, seen = Conversation(CONFIGS[name]), []
    with looking(conversation.module(where), how, seen):
        assert torch.equal(conversation.step(), expected[name][0])
    assert len(seen) == 1
    assert torch.equal(conversation.step(), expected[name][1])
    assert len(seen) == 1


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_fails_leaves_nothing(name: str, error: type[BaseException]) -> None:
    conversation = Conversation(CONFIGS[name])

    def fail(*_: object) -> None:
        raise error

    with (
        conversation.module("decoder").layers[-1].mlp.register_forward_pre_hook(fail),
        pytest.raises(error),
    ):
        conversation.step()
    assert step_left(conversation.cache) is None
    gap_triton.detach(conversation.model)
    assert hooks(conversation.model) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_from_which_pruning_is_detached(name: str, expected: dict[str, list[torch.Tensor]]) -> None:
    """In another thread, and before the layers that lack tokens: they keep what they carry until the step has ended."""
    conversation, left = Conversation(CONFIGS[name]), []

    def detach(*_: object) -> None:
        thread = threading.Thread(target=gap_triton.detach, args=(conversation.model,))
        thread.start()
        thread.join()
        left.append(hooks(conversation.model))

    with conversation.module("decoder").layers[0].mlp.register_forward_pre_hook(detach):
        assert torch.equal(conversation.step(), expected[name][0])
    # Where nothing was dropped the step has no state, and needs nothing of what is taken off.
    assert bool(left[0]) == (name != "keep")
    assert hooks(conversation.model) == 0


def test_a_decoder_that_was_replaced_before_a_step_is_refused() -> None:
    conversation = Conversation(CONFIGS["drop"])
    conversation.model.model.language_model = copy.deepcopy(build("llava", "sdpa").model.language_model)
    with pytest.raises(RuntimeError, match="was replaced after gap_triton was attached"):
        conversation.step()


def test_an_owner_that_was_replaced_before_a_step_is_refused() -> None:
    conversation = Conversation(CONFIGS["drop"])
    conversation.model.model = build("llava", "sdpa").model
    with pytest.raises(RuntimeError, match="was replaced after gap_triton was attached"):
        conversation.step()


@pytest.mark.parametrize("change", ["training", "another name"])
def test_a_model_that_prunes_no_longer_refuses_the_cache(change: str) -> None:
    conversation = Conversation(CONFIGS["drop"])
    if change == "training":
        conversation.model.train()
    else:
        conversation.model.config.text_config._attn_implementation = "sdpa"  # past transformers' methods
    with pytest.raises(ValueError, match="goes on in a model that does not prune now"):
        conversation.step()


def test_a_decoder_called_past_its_owner_refuses_the_cache() -> None:
    conversation = Conversation(CONFIGS["drop"])
    with pytest.raises(ValueError, match="a call of the decoder by itself"), torch.no_grad():
        conversation.module("decoder")(input_ids=torch.full((1, 1), 7), **{CACHE: conversation.cache})


def test_a_cache_changed_from_outside_is_refused() -> None:
    conversation = Conversation(CONFIGS["drop"])
    conversation.cache.layers[0].crop(-1)
    with pytest.raises(ValueError, match="was changed behind its own methods"):
        conversation.step()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copy_passes_its_own_hooks(duplicate: Any, expected: dict[str, list[torch.Tensor]]) -> None:
    original = build("llava", "sdpa")
    gap_triton.attach(original, CONFIGS["drop"])
    twin = duplicate(original)
    gap_triton.detach(original)
    conversation, found = Conversation(None, twin), []
    names = names_called(lambda: found.append(conversation.step()))
    assert torch.equal(found[0], expected["drop"][0])
    assert not set(OURS) & set(names)
    assert attachment_of(twin.model).owner is twin.model
    gap_triton.detach(twin)
    assert hooks(twin) == 0


def test_modules_keep_the_names_of_their_classes_and_get_them_back() -> None:
    model = build("llava", "sdpa")
    modules = [model.get_submodule(name) for name in MODULES.values()]
    own = [type(module) for module in modules]
    gap_triton.attach(model, CONFIGS["keep"])
    for module, known in zip(modules, own, strict=True):
        assert hasattr(type(module), BASE)
        assert isinstance(module, known)
        assert str(type(module)) == str(known)
    gap_triton.detach(model)
    assert [type(module) for module in modules] == own


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_step_on_a_pruned_cache_where_everything_is_kept(
    fullgraph: bool, expected: dict[str, list[torch.Tensor]]
) -> None:
    """Its layers carry nothing, and can't be given it in one graph; a wrong mask would show nowhere, so it is refused."""
    conversation = Conversation(CONFIGS["drop"])
    gap_triton.configure(conversation.model, CONFIGS["keep"])
    torch._dynamo.reset()
    compiled = torch.compile(conversation.model, backend="eager", fullgraph=fullgraph)
    if fullgraph:
        with pytest.raises(RuntimeError, match="goes on under a configuration that keeps everything"):
            conversation.step(compiled)
        conversation.length -= 1
        assert torch.equal(conversation.step(), expected["drop"][0])  # as the sentence says
    else:
        assert torch.allclose(conversation.step(compiled), expected["drop"][0], atol=1e-5)
    torch._dynamo.reset()
