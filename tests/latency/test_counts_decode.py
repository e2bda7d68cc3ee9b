"""What pruning adds to a decode step: launches, reads, copies, nodes of a compiled graph, and calls of Python functions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.methods import preset
from transformers import AutoModelForImageTextToText, DynamicCache, PreTrainedModel, StaticCache

import gap_triton
from gap_triton import GapConfig
from gap_triton.arguments import CACHE
from gap_triton.demo.architectures import ARCHITECTURES
from gap_triton.demo.grounding import prepare
from gap_triton.demo.scenes import held_out
from gap_triton.integration.attach import is_attached
from gap_triton.latency import Subject, Variant, count, variants_of
from gap_triton.latency.counting import Counts
from gap_triton.presets import PRESETS

CPU = torch.device("cpu")
PAD, WORD = 0, 5
LAUNCHES = 3  # of a step on a static cache, or behind prompts of several lengths; none elsewhere
NODES = 5
# Calls of Python functions: by layer the attention function, while its own call takes the place of torch's; for the three
# modules around the layers, and the function that makes masks; and for the cache's record.
CALLS_PER_LAYER, CALLS_AROUND, CALLS_OF_A_CACHE = 1, 24, 16


@functools.cache
def load(name: str) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(ARCHITECTURES[name].folder).eval()


@functools.cache
def prompts(name: str, samples: int) -> dict[str, torch.Tensor]:
    """One prompt; or two, the first with more words, and the other padded on the left."""
    architecture = ARCHITECTURES[name]
    inputs = dict(prepare(architecture.load_processor(architecture.folder), held_out(samples)))
    if samples == 1:
        return inputs
    for key, word, padding in (
        ("input_ids", WORD, PAD),
        ("attention_mask", 1, 0),
        ("mm_token_type_ids", 0, 0),
    ):
        if key in inputs:
            first, second = inputs[key]
            more, pad = first.new_full((3,), word), first.new_full((3,), padding)
            inputs[key] = torch.stack([torch.cat([first, more]), torch.cat([pad, second])])
    return inputs


@torch.no_grad()
def step_counts(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: str) -> Counts:
    """What the third step behind a prompt asks of the device."""
    batch, length = inputs["input_ids"].shape
    text = model.config.get_text_config()
    if cache == "dynamic":
        held = DynamicCache(config=text)
    elif cache == "shrunk":
        held = gap_triton.static_cache(model, length + 4)
    else:
        held = StaticCache(config=text, max_cache_len=length + 4)
    model(**inputs, **{CACHE: held}, logits_to_keep=1)
    mask = inputs["attention_mask"] if batch > 1 else None
    token, ids = torch.full((batch, 1), WORD), torch.full((batch, 1), length)
    ids = ids.expand(3, -1, -1) if "image_grid_thw" in inputs else ids

    def step(number: int) -> None:
        seen = None if mask is None else torch.cat([mask, mask.new_ones(batch, number + 1)], dim=1)
        model(
            input_ids=token, attention_mask=seen, position_ids=ids + number, **{CACHE: held}, logits_to_keep=1
        )

    step(0)
    step(1)
    return count(lambda: step(2), CPU)


@functools.cache
def unpruned_counts(name: str, samples: int, static: bool) -> Counts:
    model = load(name)
    assert not is_attached(model)
    return step_counts(model, prompts(name, samples), "static" if static else "dynamic")


@pytest.mark.parametrize("samples", [1, 2], ids=["one", "ragged"])
@pytest.mark.parametrize(
    ("method", "cache"),
    [(name, cache) for name in PRESETS for cache in ("dynamic", "shrunk")]
    + [("pyramiddrop", "static"), ("nuwa", "static")],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_asks_for_next_to_nothing(name: str, method: str, samples: int, cache: str) -> None:
    model = load(name)
    before = unpruned_counts(name, samples, cache != "dynamic")
    config = preset(method, len(model.model.language_model.layers), cls=name == "llava")
    with gap_triton.pruning(model, config):
        found = step_counts(model, prompts(name, samples), cache)
        assert gap_triton.last_selection(model) is not None
    assert (found.reads, found.copies) == (before.reads, before.copies)
    limit = 0 if (cache, samples) == ("dynamic", 1) else LAUNCHES
    assert found.launches - before.launches <= limit, found.operators - before.operators


def variants(name: str, config: GapConfig, static: bool = False) -> dict[str, Variant]:
    subject = Subject(name, load(name), prompts(name, 1), 64)
    return {each.name: each for each in variants_of(subject, config, steps=8, static=static)}


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "cls"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compiled_step_has_few_more_nodes(name: str, method: str) -> None:
    layers = len(load(name).model.language_model.layers)
    made = variants(name, preset(method, layers, cls=name == "llava"), static=True)
    nodes = {}
    for which in ("sdpa", "attached", "pruned"):
        torch._dynamo.reset()
        graphs: list[int] = []

        def backend(module: torch.fx.GraphModule, inputs: list, graphs: list[int] = graphs) -> Any:
            graphs.append(sum(node.op in ("call_function", "call_method") for node in module.graph.nodes))
            return module.forward

        variant = made[which]
        variant.step = torch.compile(variant.model, backend=backend, fullgraph=True)
        variant.prefill()
        for _ in range(3):
            variant.decode()
        assert len(graphs) == 1
        nodes[which] = graphs[0]
    assert nodes["attached"] == nodes["sdpa"]
    assert nodes["pruned"] - nodes["sdpa"] <= NODES


def python_calls(function: Callable[[], object]) -> int:
    """How many functions of Python are called: the same in every run, unlike times."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "cls"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_calls_few_functions(name: str, method: str) -> None:
    """Later layers are not asked, nothing is on layers where all is kept, and nothing is asked where nothing was dropped."""
    first, layers = load(name).model.language_model.layers[0], len(load(name).model.language_model.layers)
    config = preset(method, layers, cls=name == "llava")
    calls = {}
    for which, variant in variants(name, config).items():
        variant.prefill()
        for _ in range(3):
            variant.decode()
        calls[which] = python_calls(variant.decode)
    limit = CALLS_PER_LAYER * layers + CALLS_AROUND
    assert calls["attached"] - calls["sdpa"] <= limit
    # Layers of some releases of transformers have a call of their own, which stays.
    limit += 0 if type(first).__call__ is torch.nn.Module.__call__ else layers
    assert calls["pruned"] - calls["oracle"] <= limit + CALLS_OF_A_CACHE + 2 * len(config.stages)
