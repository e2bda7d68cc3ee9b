"""The steps of the GPU check, on a CPU: that they find what is wrong, and run where nothing is.

What needs CUDA runs against stand-ins, which shows that the code works and no more.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import fake_cuda
from support.shapes import small_subject

import gap_triton
from bench import cuda, exact, floor, operators, outside
from bench.models import LLAMA, TINY_DECODERS, build, make_prompt, sharing_weights
from bench.oracle import Oracle, relative_error
from bench.outcome import Found, NotAvailable, StepFailed
from bench.shapes import TINY_DECODER, TINY_TOWER, Case, Inputs, make_inputs
from bench.steps import (
    STEPS,
    end_to_end,
    end_to_end_graphs,
    model_graphs,
    one_or_several,
    reduce_overhead,
    waiting,
)
from bench.steps.end_to_end import run_models
from bench.steps.float64 import compare_with_float64
from bench.steps.graphs import replay_graphs
from bench.steps.hand_over import time_hand_over
from bench.steps.host import time_the_host
from bench.steps.probe import kernel_names
from bench.steps.relaunch import relaunch
from bench.steps.select import select
from bench.steps.settings import Settings, settings_for, tiny
from bench.steps.streams import run_on_streams
from bench.steps.waiting import by_tickets

CPU = torch.device("cpu")


def test_every_step_is_there() -> None:
    for name in STEPS.values():
        module, _, function = name.partition(":")
        assert callable(getattr(importlib.import_module(f"bench.steps.{module}"), function))


def test_a_cpu_is_asked_for_little() -> None:
    assert settings_for(CPU).relaunches == 25
    assert settings_for(torch.device("cuda")).relaunches == 10_000
    assert Settings(CPU).visual_tokens == (576, 2880, 4096)


def test_steps_that_need_a_gpu_say_so() -> None:
    for step in (replay_graphs, time_hand_over, model_graphs.replay_models):
        with pytest.raises(cuda.NeedsCuda, match="needs CUDA, this is cpu"):
            list(step(tiny(CPU)))
    with pytest.raises(NotAvailable, match="need Triton's interpreter, TRITON_INTERPRET=1"):
        list(by_tickets(tiny(CPU)))


def test_graph_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    (found,) = replay_graphs(tiny(CPU))
    assert len(found["operators"]) == len(operators.DECODER_CALLS) + len(operators.TOWER_CALLS)

    monkeypatch.setattr(fake_cuda.FakeGraph, "replay", lambda graph: None)
    with pytest.raises(StepFailed, match="prune_tokens: a replay differs from the eager call"):
        list(replay_graphs(tiny(CPU)))


def test_steps_find_what_changes_from_launch_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny(CPU)
    (found,) = relaunch(settings)
    assert found["launches"] == 25
    launches = iter(range(10**9))
    right = operators.prune_tokens

    def drifting(x):
        *rest, scores = right(x)
        return *rest, scores * (1 + 1e-6 * (next(launches) == 20))

    monkeypatch.setattr(operators, "prune_tokens", drifting)
    with pytest.raises(StepFailed, match=r"\d+ elements differ from the first launch"):
        list(relaunch(settings))
    launches = iter([20] * 4 + [0] * 10**4)
    monkeypatch.setitem(operators.DECODER_CALLS, "prune_tokens", drifting)
    with pytest.raises(StepFailed, match=r"results differ from one stream's: prune_tokens$"):
        list(run_on_streams(settings))


def test_times_of_operators() -> None:
    found, *_ = time_the_host(tiny(CPU))
    assert len(found["host_us"]) == len(operators.DECODER_CALLS) + len(operators.TOWER_CALLS)
    (found,) = select(tiny(CPU))
    assert found["error"] == 0.0
    assert found["mode"] == "eager, on a CPU"


@pytest.mark.parametrize("name", [*operators.DECODER_CALLS, *operators.TOWER_CALLS])
def test_every_result_is_held_against_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, shape = (
        (operators.DECODER_CALLS, TINY_DECODER)
        if name in operators.DECODER_CALLS
        else (operators.TOWER_CALLS, TINY_TOWER)
    )
    right = calls[name]
    x = make_inputs(Case(shape, 2), torch.bfloat16, CPU)
    assert exact.check(right, x) < 0.05
    for part in range(len(right(x))):

        def wrong(x, part=part):
            result = [tensor.clone() for tensor in right(x)]
            if x.query.dtype != torch.float64:
                result[part][-1, 0] += 1
            return tuple(result)

        with pytest.raises(AssertionError):
            exact.check(wrong, x)
        with pytest.raises(AssertionError):  # by the operator that it is a way to run
            exact.check(lambda x, part=part: wrong(x, part), x, right)
    monkeypatch.setitem(calls, name, wrong)
    with pytest.raises(StepFailed, match=f"{name}, .*: AssertionError"):
        list(compare_with_float64(tiny(CPU)))


def test_kernels_are_known_by_name() -> None:
    pytest.importorskip("triton")
    assert {"prune_kernel"} < kernel_names()


@pytest.mark.parametrize("kind", TINY_DECODERS, ids=lambda kind: kind.name)
def test_a_pruned_model_is_held_against_the_oracle(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "TINY_DECODERS", (kind,))
    settings = tiny(CPU)
    found = list(run_models(settings))
    assert len([each for each in found if "error" in each]) == len(end_to_end.KEEPS)
    timings = [each["timing"] for each in found if "timing" in each]
    assert {(each["what"], each["way"]) for each in timings} == {
        (what, way) for what in ("prefill", "decode, per token") for way in ("unpruned", "pruned", "oracle")
    }
    kept = {each["way"]: each["kv_bytes"] for each in found if "kv_bytes" in each}
    assert kept["pruned"] == kept["oracle"] < kept["unpruned"]
    assert {each["host_waits"] for each in found if "host_waits" in each} == {
        "not measured, a CPU has no stream"
    }

    # Survivors that are numbered anew give other logits, which the check must see.
    monkeypatch.setattr(gap_triton, "GapConfig", functools.partial(gap_triton.GapConfig, ids="compacted"))
    with pytest.raises(StepFailed, match=rf"{kind.name}, 40 visual tokens, keep 0\.5: logits are off by"):
        list(run_models(settings))


def test_the_ways_of_a_gpu_run_on_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, graphs, memory and host waits: that this code runs, before there is a GPU to try it on."""
    fake_cuda.install(monkeypatch)
    for module in (waiting, one_or_several):
        monkeypatch.setattr(module, "in_one_launch", lambda x, rows=None, ticket=None: pruned_by(rows, x))
        monkeypatch.setattr(module, "require_kernels", lambda device: None)
    monkeypatch.setattr(one_or_several, "in_several_launches", lambda x, rows=None: pruned_by(rows, x))
    rates = floor.Rates(bytes_per_us=1000.0, flops_per_us=1e6, launch_us={"eager": 2.0, "graph": 1.0})
    monkeypatch.setattr(floor, "measure_rates", lambda device, dtype: rates)  # of a GPU's amount of bytes
    monkeypatch.setattr(waiting, "SIDE", 8)
    monkeypatch.setattr(waiting, "ROUNDS", (3,))
    monkeypatch.setattr(waiting, "CROWDED_ROUNDS", 3)
    monkeypatch.setattr(end_to_end, "DECODERS", TINY_DECODERS[:1])
    monkeypatch.setattr(end_to_end, "PREFILL_S", 0.01)
    monkeypatch.setattr(end_to_end, "DECODE_S", 0.01)
    settings = tiny(CPU)
    assert [found["mode"] for found in select(settings)] == ["graph"]
    assert [found["wrong"] for found in waiting.all_at_once(settings) if "wrong" in found] == [0]
    crowded = list(waiting.while_others_fill_the_device(settings))
    assert [(found["ticket"], found["wrong"]) for found in crowded] == [(True, 0), (False, 0)]
    rows = [found["row"] for found in one_or_several.compare(settings)]
    assert {(row["operator"], row["implementation"], row["mode"]) for row in rows} == {
        (operator, way, mode)
        for operator in ("prune_tokens", "prune_tokens, text rows")
        for way in ("triton", "one launch", "one launch, cooperative", "several launches", "reference")
        for mode in ("graph", "eager")
    }
    found = list(run_models(settings))
    assert {each["peak_bytes"] for each in found if "peak_bytes" in each} == {2**20}
    assert {each["host_waits"] for each in found if "host_waits" in each} == {0}


def test_compiled_steps_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling: `make gpu-check ARGS="--device cpu"` does that."""
    options: list[dict[str, object]] = []

    def compiled(function, **given):
        options.append(given)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    *calls, last = reduce_overhead.run_compiled(tiny(CPU))
    assert [found["wrong"] for found in calls] == [0] * reduce_overhead.CALLS
    assert last == {"cudagraph_skips": 0}
    assert options == [{"fullgraph": True, "backend": "aot_eager"}]
    monkeypatch.setattr(exact, "differing", lambda left, right: torch.tensor(3))
    with pytest.raises(StepFailed, match="call 0: 3 elements differ from the eager call"):
        list(reduce_overhead.run_compiled(tiny(CPU)))

    def generate(whole, prompt, extra, settings):
        if extra:
            raise ValueError("no such graph")
        return {"compiled_us": 1.0}

    monkeypatch.setattr(end_to_end_graphs, "_generate", generate)
    found: list[Found] = []
    with pytest.raises(StepFailed, match=r"^pruned, generate\(\) compiled: ValueError: no such graph$"):
        found.extend(end_to_end_graphs.run_compiled_models(tiny(CPU)))
    assert [(each["way"], each.get("mode"), "does_not_work" in each) for each in found] == [
        ("unpruned", None, False),
        ("unpruned", "compiled", False),
        ("pruned", "compiled", False),
        ("unpruned", "CUDA graph", True),
        ("pruned", "CUDA graph", True),
    ]


def test_captured_models_are_held_against_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(model_graphs, "subject_on", lambda device, dtype: small_subject("smol", 36))
    monkeypatch.setattr(model_graphs, "CONFIG", gap_triton.GapConfig(0.25, 0))
    monkeypatch.setattr(model_graphs, "ROUNDS", 2)
    monkeypatch.setattr(model_graphs, "STEPS", 2)
    first, *rows = model_graphs.replay_models(tiny(CPU))
    assert first["error"] < 1e-5
    assert [row["variant"] for row in rows] == [
        "sdpa", "attached", "pruned", "oracle", "sdpa graph", "pruned graph", "oracle graph"
    ]  # fmt: skip
    monkeypatch.setattr(fake_cuda.FakeGraph, "replay", lambda graph: None)
    with pytest.raises(StepFailed, match="pruned graph: logits differ from the oracle's"):
        list(model_graphs.replay_models(tiny(CPU)))


def pruned_by(rows: torch.Tensor | None, x: Inputs) -> operators.Result:
    """What both ways compute."""
    return operators.prune_tokens(x) if rows is None else operators.prune_tokens_text(x)


def test_host_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert end_to_end._host_waits(call, CPU) == {"host_waits": 3}
    assert modes == ["warn", "default"]


@torch.inference_mode()
def test_an_oracle_that_drops_nothing_is_the_model() -> None:
    for kind in TINY_DECODERS:
        model = build(kind, CPU, torch.float32)
        prompt = make_prompt(kind, model, 40, 2)
        logits, _ = end_to_end.Whole(model).prefill(prompt)
        every = torch.arange(prompt.embeds.shape[1])[None]
        oracle, _ = Oracle(model, 2).prefill(prompt, every)
        assert relative_error(oracle, logits) <= 1e-5
        assert relative_error(oracle + 1, logits) > 0.1


def test_copies_share_their_weights() -> None:
    model = build(TINY_DECODERS[0], CPU, torch.float32)
    copy: Any = sharing_weights(model)
    assert {id(each) for each in copy.parameters()} == {id(each) for each in model.parameters()}
    copy.model.layers = copy.model.layers[:1]
    assert len(model.model.layers) == 5
    assert LLAMA.of("8 layers", num_hidden_layers=8).sizes["num_hidden_layers"] == 8
    assert LLAMA.sizes["num_hidden_layers"] == 32


INTERPRETED = """
import gap_kernels, torch
from gap_kernels.backends import triton_is_interpreted
from dataclasses import replace
from bench import exact, operators
from bench.prune_ways import in_several_launches
from bench.shapes import make_inputs
from bench.steps.float64 import compare_with_float64
from bench.steps.relaunch import relaunch
from bench.steps.settings import tiny
from bench.steps.streams import run_on_streams
from bench.steps.waiting import by_tickets
assert triton_is_interpreted()
settings = replace(tiny(torch.device("cpu")), relaunches=2, threads=1, repeats=1)
assert all(not found.get("wrong") for found in by_tickets(settings))
exact.check(in_several_launches, make_inputs(settings.small, torch.float32, settings.device), operators.prune_tokens)
with gap_kernels.backend("triton"):
    for step in (compare_with_float64, relaunch, run_on_streams):
        list(step(settings))
print("the kernels ran")
"""


def test_steps_on_the_kernels_in_the_interpreter() -> None:
    numpy, triton = pytest.importorskip("numpy"), pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and numpy.__version__ >= "2.4":
        pytest.skip("the interpreter of Triton before 3.7 can't loop to a scalar with numpy 2.4 or later")
    ended = outside.run([sys.executable, "-c", INTERPRETED], 200, TRITON_INTERPRET="1")
    assert ended.status == 0, ended.output
    assert "the kernels ran" in ended.output


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch is compared with the first, and that with float64."""
    calls = iter(range(10**9))

    def drifting(x, ticket):
        *rest, scores = operators.prune_tokens(x)
        return *rest, scores * (1 + 1e-6 * (next(calls) == 2))

    monkeypatch.setattr(waiting, "in_one_launch", drifting)
    monkeypatch.setattr(waiting, "require_kernels", lambda device: None)
    with pytest.raises(StepFailed, match=r"tiny-b2: \d+ elements differ from the first launch"):
        list(waiting.by_tickets(tiny(CPU)))
    calls = iter(range(10**9))
    with pytest.raises(StepFailed, match="elements differ from those of an idle device"):
        list(waiting.while_others_fill_the_device(replace(tiny(CPU), at_once=0)))
