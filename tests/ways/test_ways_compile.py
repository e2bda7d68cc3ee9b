"""torch.compile: decoding as one graph, by generate() itself, and a compiled model's prefill. Only dynamo runs."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.comparison import TOLERANCE, error
from support.tiny import generate
from support.ways import MODELS, build, make, pair
from torch._dynamo.utils import counters

import gap_triton
from gap_triton import GapConfig, Stage


class Graphs:
    """Counts what a back end is given; the back end runs it as it is."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.count = self.reads = 0

        def backend(module: torch.fx.GraphModule, inputs: list) -> object:
            self.count += 1
            self.reads += sum(node.target == "item" for node in module.graph.nodes)
            return module.forward

        self.backend = backend  # a function: generate() copies its configuration

    @property
    def breaks(self) -> int:
        return sum(counters["graph_break"].values())


def config_for(graphs: Graphs) -> transformers.CompileConfig:
    config = transformers.CompileConfig(fullgraph=True, backend=graphs.backend, mode=None)
    config._compile_all_devices = True  # generate() compiles on accelerators only, unless told so
    return config


@pytest.mark.parametrize("shrinks", [False, True], ids=["full", "shrunk"])
@pytest.mark.parametrize("name", MODELS)
def test_decode_steps_are_one_graph(name: str, shrinks: bool) -> None:
    """One graph for all steps and for all prompts of one shape, whatever tokens each of them keeps."""
    model, _, _ = pair(name)
    graphs = Graphs()
    config = config_for(graphs)
    cache = gap_triton.static_cache(model, max_cache_len=70)
    kept = []
    for seed in (1, 2, 3):
        inputs = make(name, "left-padded", seed)
        expected = generate(model, inputs)
        kept.append(gap_triton.last_selection(model).index)
        where = {"past_key_values": cache} if shrinks else {"cache_implementation": "static"}
        compiled = generate(model, inputs, compile_config=config, **where)
        assert torch.equal(compiled.sequences, expected.sequences)
        assert error(compiled, expected) <= TOLERANCE
        cache.reset()
    assert not torch.equal(kept[0], kept[1])
    assert (graphs.count, graphs.breaks, graphs.reads) == (1, 0, 0)


@pytest.mark.parametrize(
    "config",
    [
        GapConfig(0.4, -1, "random"),
        GapConfig(0.6, -1, "random", then=(Stage(0.3, 2, "text"),)),
        GapConfig(0.6, 0, "text", ids="compacted", then=(Stage(0.3, 2, "text"),)),
    ],
    ids=["before", "before, then inside", "compacted"],
)
@pytest.mark.parametrize("name", MODELS)
def test_decode_steps_behind_several_stages_are_one_graph(name: str, config: GapConfig) -> None:
    model = build(name, "gap_triton")
    gap_triton.configure(model, config)
    graphs = Graphs()
    options = {"compile_config": config_for(graphs)}
    cache = gap_triton.static_cache(model, max_cache_len=70)
    for seed in (1, 2):
        inputs = make(name, "left-padded", seed)
        expected = generate(model, inputs)
        compiled = generate(model, inputs, past_key_values=cache, **options)
        assert torch.equal(compiled.sequences, expected.sequences)
        assert error(compiled, expected) <= TOLERANCE
        cache.reset()
    assert (graphs.count, graphs.breaks, graphs.reads) == (1, 0, 0)


def test_another_number_of_kept_tokens_is_another_graph() -> None:
    model, _, _ = pair()
    graphs = Graphs()
    config = config_for(graphs)
    inputs = make("llava", "left-padded")
    for keep in (0.4, 0.4, 0.6):
        gap_triton.configure(model, GapConfig(keep=keep, layer=1))
        expected = generate(model, inputs)
        compiled = generate(model, inputs, compile_config=config, cache_implementation="static")
        assert error(compiled, expected) <= TOLERANCE
    assert (graphs.count, graphs.breaks) == (2, 0)


@pytest.mark.parametrize("name", ["llava"])
def test_a_compiled_model_prunes_its_prompt(name: str) -> None:
    """What survives is planned on the host, so a compiled prefill breaks there; it is not compiled anew for each image."""
    model, _, _ = pair(name)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs.backend)
    made = []
    with torch.no_grad():
        for seed in (1, 2, 3):
            inputs = make(name, "left-padded", seed)
            expected = model(**inputs).logits
            index = gap_triton.last_selection(model).index
            assert float((compiled(**inputs).logits - expected).abs().max()) <= TOLERANCE
            assert torch.equal(gap_triton.last_selection(model).index, index)
            made.append(graphs.count)
    assert made[1] == made[2]
