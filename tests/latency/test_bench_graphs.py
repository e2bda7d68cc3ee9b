"""What `gap-triton bench --graph` captures, on a stand-in for CUDA that replays the operators it has seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import fake_cuda, tiny
from support.command_line import cli, refuses
from support.shapes import small_subject

from gap_triton import GapConfig, Stage
from gap_triton.latency import Subject, count, variants_of
from gap_triton.latency.graphs import captured_variants, refuse_without_cuda
from gap_triton.latency.measure import WrongLogits, check_against_oracle, check_all

CPU = torch.device("cpu")
SAME = 1e-5  # of the largest logit, in float32
STEPS = 8
CONFIGS = {
    "inside": GapConfig(0.4, 0),
    "twice": GapConfig(0.6, -1, "text_similarity", then=(Stage(0.3, 0, "last_token"),)),
    "before": GapConfig(0.4, -1, "text_similarity"),
    "merged": GapConfig(0.4, -1, "random", merge="average"),
    "spread": GapConfig(0.4, 0, "text", "region"),
}


NAMES = ["sdpa graph", "pruned graph", "oracle graph"]


@pytest.fixture(autouse=True)
def _stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)


def subject(kind: str) -> Subject:
    """A tiny LLaVA with two samples, or a small Qwen2.5-VL, whose position ids have three axes."""
    if kind == "qwen2.5-vl-7b":
        return small_subject(kind, 36)
    inputs = tiny.prompt(kind, images=[[tiny.Image()]], before=[3], after=[6])
    inputs = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    return Subject("tiny", tiny.build(kind), inputs, tiny.GRID**2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl-7b"])
def test_replays_have_the_logits_of_eager_calls(kind: str, name: str) -> None:
    """Of the prompt and of steps, and again for another image, whose values alone are new."""
    measured = subject(kind)
    captured = {each.name: each for each in captured_variants(measured, CONFIGS[name], steps=STEPS)}
    assert list(captured) == NAMES
    for turn in range(2):
        if turn:
            pixels = measured.inputs["pixel_values"]
            pixels.copy_(pixels.flip(-1) * 0.5)
        eager = {each.name: each for each in variants_of(measured, CONFIGS[name], steps=STEPS, static=True)}
        for one in ("sdpa", "pruned") if turn else ("sdpa", "pruned", "oracle"):
            assert check_against_oracle(captured[f"{one} graph"], eager[one], steps=3) <= SAME


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl-7b"])
def test_nothing_that_is_captured_waits_for_the_device(kind: str) -> None:
    """A capture can't: what the host reads there would be what the capture's own prompt held."""
    measured = subject(kind)
    for name, config in CONFIGS.items():
        for each in captured_variants(measured, config, steps=STEPS):
            for captured in (each.read_prompt, each.take_step):
                counts = count(torch.no_grad()(captured), CPU)
                assert (name, each.name, counts.reads, counts.copies) == (name, each.name, 0, 0)


def test_a_replay_that_writes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, config = subject("llava"), CONFIGS["inside"]
    made = [*variants_of(measured, config, steps=STEPS), *captured_variants(measured, config, steps=STEPS)]
    assert check_all(made) <= SAME
    # Before this prefill, the graphs hold what another prompt has left in them.
    monkeypatch.setattr(fake_cuda.FakeGraph, "replay", lambda graph: None)
    with pytest.raises(WrongLogits, match="pruned graph: logits differ from the oracle's"):
        check_all(captured_variants(measured, config, steps=STEPS) + made)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            GapConfig(0.4, -1, "cls"),
            "by what the vision encoder makes, which is not in the graph: leave --graph out",
        ),
        (GapConfig(0.4, -1, "random", merge="nearest"), "by what the vision encoder makes"),
        (GapConfig(0.4, 1, "random"), "'random' at a layer of the decoder, which draws on the host"),
    ],
)
def test_what_is_not_in_the_graph_is_refused(config: GapConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        captured_variants(subject("llava"), config, steps=STEPS)


def test_a_decoder_that_is_handed_more_is_refused() -> None:
    measured = subject("llava")
    measured.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "deepstack_visual_embeds": [torch.zeros(1)]}),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match="is handed deepstack_visual_embeds as well: leave --graph out"):
        captured_variants(measured, CONFIGS["inside"], steps=STEPS)


def test_the_command_refuses_without_a_gpu() -> None:
    refuses(
        "--graph captures CUDA graphs, which need a GPU: leave out --graph, or --device cpu",
        "bench", "--config", "smol", "--graph", "--device", "cpu",
    )  # fmt: skip
    refuses(
        "--graph captures CUDA graphs, which need a GPU, and the device is cpu: leave --graph out",
        "bench", "--model", "no/such", "--graph",
    )  # fmt: skip
    refuse_without_cuda(torch.device("cuda", 1))


def test_the_command_refuses_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gap_triton_cli.measure.refuse_without_cuda", lambda device: None)
    refuses(
        "this configuration chooses or merges by what the vision encoder makes",
        "bench", "--model", "no/such", "--method", "nuwa", "--graph",
    )  # fmt: skip


def test_the_command_measures_graphs_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gap_triton_cli.measure.refuse_without_cuda", lambda device: None)
    path = tmp_path / "r.json"
    result = cli(
        "bench", "--model", "embedded", "--keep", "0.25", "--graph",
        "--rounds", "2", "--output-len", "2", "--json", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert [row["variant"] for row in report["rows"]] == ["sdpa", "attached", "pruned", "oracle", *NAMES]
    assert (report["graphs"], report["error"] < SAME) == (True, True)
    by_name = {row["variant"]: row for row in report["rows"]}
    assert (
        by_name["pruned graph"]["kv_bytes"]
        == by_name["oracle graph"]["kv_bytes"]
        < by_name["sdpa graph"]["kv_bytes"]
    )
    assert (
        by_name["pruned graph"]["peak_bytes"] is None
    )  # it holds its memory for good, and none of it is allocated anew
    assert [row["syncs"]["decode"] for row in report["rows"] if row["variant"] in NAMES] == [0] * 3
    assert [sentence.split(",")[0] for sentence in report["verdict"][2:]] == ["as a CUDA graph"] * 2
