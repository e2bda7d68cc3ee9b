"""What `gap-triton bench` rests on: the oracle, the counts, the shapes and the words. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import tiny
from support.command_line import cli
from support.shapes import small_subject

from gap_triton import GapConfig, Stage
from gap_triton.latency import SHAPES, Measurement, Subject, count, measure, random_subject, variants_of
from gap_triton.latency.counting import Counts
from gap_triton.latency.measure import WrongLogits, check_against_oracle, ratio, spread
from gap_triton.latency.report import bytes_in_words, rows_of, verdict
from gap_triton.latency.subjects import square_side

CPU = torch.device("cpu")
CONFIGS = {
    "inside": GapConfig(0.4, 1),
    "before": GapConfig(0.4, -1, "cls"),
    "twice": GapConfig(0.6, 0, "text", then=(Stage(0.3, 2, "last_token"),)),
    "before, then inside": GapConfig(0.6, -1, "random", then=(Stage(0.3, 2, "text"),)),
    "merged": GapConfig(0.4, -1, "random", merge="average"),
}
SAME = 1e-5  # of the largest logit, in float32


def subject(batch: int = 1) -> Subject:
    """A tiny LLaVA and the same prompt in every sample."""
    inputs = tiny.prompt("llava", images=[[tiny.Image()]], before=[3], after=[6])
    inputs = {name: value.repeat(batch, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    return Subject("tiny", tiny.build("llava"), inputs, tiny.GRID**2)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_oracle_has_the_logits_of_the_pruned_model(name: str, static: bool) -> None:
    """Its layers are cut down by other code, so that agreement says something about both."""
    made = {each.name: each for each in variants_of(subject(2), CONFIGS[name], steps=6, static=static)}
    assert check_against_oracle(made["pruned"], made["oracle"], steps=3) <= SAME
    assert made["oracle"].kv_bytes() == made["pruned"].kv_bytes()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_an_oracle_of_other_rows_is_noticed(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {each.name: each for each in variants_of(subject(), GapConfig(0.4, 1), steps=6, static=static)}
    oracle = made["oracle"].prefilling.__self__  # type: ignore[attr-defined]
    survivors = oracle.survivors[0]
    survivors.rows = survivors.rows.clone()
    visual = set(range(4, 4 + tiny.GRID**2))
    kept = set(survivors.rows.tolist())
    gone = min(visual - kept)
    survivors.rows[survivors.rows == min(kept & visual)] = gone
    survivors.rows = survivors.rows.sort().values
    with pytest.raises(WrongLogits, match="differ from the oracle's"):
        check_against_oracle(made["pruned"], made["oracle"])


def test_the_oracle_leaves_the_model_as_it_was() -> None:
    made = {each.name: each for each in variants_of(subject(), GapConfig(0.4, 1), steps=4)}
    made["oracle"].prefill()
    assert not any("forward" in module.__dict__ for module in made["oracle"].model.modules())
    assert not any(module._forward_pre_hooks for module in made["oracle"].model.modules())


def test_variants_share_their_weights() -> None:
    made = variants_of(subject(), GapConfig(0.4, 1), steps=4)
    pointers = [
        {name: each.data_ptr() for name, each in variant.model.named_parameters()} for variant in made
    ]
    assert all(each == pointers[0] for each in pointers)
    assert len({id(variant.model) for variant in made}) == len(made)


def test_what_drops_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep=1.0 drops nothing of this prompt"):
        variants_of(subject(), GapConfig(1.0), steps=4)


def test_reads_copies_and_launches_are_counted() -> None:
    """Views launch nothing; what Python reads or hands over is seen although no operator shows it on a CPU."""
    x = torch.arange(6.0)

    def work() -> None:
        y = x.view(2, 3) + 1  # 1 launch
        y[0].tolist()  # 1 read
        float(y.sum())  # 1 launch, 1 read
        y[y > 2]  # 2 launches, the size of the second is read
        torch.tensor([1, 2], device="cpu")  # 1 copy
        torch.tensor([1, 2])  # stays on the host
        y.repeat_interleave(2, dim=0)  # the size of its result is known

    counts = count(work, CPU)
    assert (counts.reads, counts.copies, counts.syncs) == (3, 1, 4)
    assert counts.operators["add"] == counts.operators["sum"] == counts.operators["gt"] == 1
    assert counts.operators["view"] == 0
    assert counts.launches == sum(counts.operators.values())


def test_an_operator_is_one_launch() -> None:
    import gap_kernels

    scores = torch.rand(2, 40)
    assert count(lambda: gap_kernels.topk_indices(scores, 8), CPU).operators == {"topk_indices": 1}


def test_measurements_have_everything() -> None:
    made = variants_of(subject(), GapConfig(0.4, 1), steps=8)
    steps: list[str] = []
    found = measure(made, rounds=2, steps=2, device=CPU, progress=lambda what, done: steps.append(what))
    assert list(found) == ["sdpa", "attached", "pruned", "oracle"]
    assert steps == ["warm-up"] * 4 + ["prefill"] * 8 + ["decode"] * 8
    for each in found.values():
        assert len(each.prefill_s) == len(each.decode_s) == 2
        assert min(each.kv_bytes, each.peak_bytes, each.prefill.launches) > 0
        assert each.decode is not None
        assert each.decode.launches > 0
    assert (
        found["pruned"].kv_bytes
        == found["oracle"].kv_bytes
        < found["sdpa"].kv_bytes
        == found["attached"].kv_bytes
    )
    rows = rows_of(found)
    keys = {"variant", "baseline", "prefill_ms", "decode_ms", "kv_bytes", "peak_bytes", "launches", "syncs"}
    assert all(keys <= row.keys() for row in rows)
    json.dumps(rows)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_prompts_of_as_many_visual_tokens_as_they_say(name: str) -> None:
    """Each with few, narrow layers: the model takes its inputs, and nothing is missing."""
    shape = SHAPES[name]
    made = variants_of(small_subject(name, shape.visual_tokens), GapConfig(0.25, 0), steps=4)
    by_name = {each.name: each for each in made}
    assert check_against_oracle(by_name["pruned"], by_name["oracle"], steps=1) <= SAME
    kept = by_name["sdpa"].inputs["input_ids"].shape[1] - by_name["pruned"].cache.layers[1].keys.shape[2] + 1
    assert kept == shape.visual_tokens - shape.visual_tokens // 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("smol", 500), r"visual_tokens=500: .* a square number such as 484 or 529"),
        (("qwen2.5-vl-7b", 7), r"visual_tokens=7: .* a square number such as 9 or 16"),
        (("llava-next-7b", 576), r"visual_tokens=576: llava-next-7b has an image of 2928 tokens"),
        (("gpt", 64), r"config 'gpt': expected one of llava-1.5-7b, "),
    ],
)
def test_shapes_that_do_not_exist_are_refused(arguments: tuple[str, int], sentence: str) -> None:
    name, tokens = arguments
    with pytest.raises(ValueError, match=sentence):
        random_subject(name, visual_tokens=tokens, batch=1, device=CPU, dtype=torch.float32)


def test_weights_without_room_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1024)
    with pytest.raises(
        ValueError, match=r"smol has 0.6 GiB of weights in torch.float32, and cpu has room for 0.0 GiB"
    ):
        random_subject("smol", visual_tokens=None, batch=1, device=CPU, dtype=torch.float32)


def test_squares() -> None:
    assert [square_side(n * n) for n in (1, 2, 24, 64)] == [1, 2, 24, 64]


def test_spreads_and_ratios() -> None:
    assert (spread([3.0]).p20, spread([3.0]).p80) == (3.0, 3.0)
    assert (spread([1, 2, 3, 4, 5, 6]).median, spread([1, 2, 3, 4, 5, 6]).p20) == (3.5, 2.0)
    # Round by round: what slows the machine in one of them slows both.
    assert ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]).median == 2.0


def measured(**times: tuple[float, float]) -> dict[str, Measurement]:
    """Measurements without spread: seconds of a prefill and of a step, by variant."""
    return {
        name: Measurement(name, [prefill] * 5, [step] * 5, decode=Counts())
        for name, (prefill, step) in times.items()
    }


def test_verdicts_are_in_words() -> None:
    fast = measured(sdpa=(3.0, 0.10), pruned=(1.0, 0.112), oracle=(0.98, 0.1))
    prefill, decode = verdict(fast, static=False, compiled=False)
    assert prefill == "prefill 3.00 times faster than sdpa, 98% of the oracle's speed"
    assert decode == (
        "decode 12% slower than sdpa, 89% of the oracle's speed: it is bound by the host; --cache static --compile takes "
        "the host out"
    )
    _, static = verdict(fast, static=True, compiled=False)
    assert static.endswith("it is bound by the host; --compile takes the host out")
    slow = measured(sdpa=(1.0, 0.1), pruned=(1.2, 0.1), oracle=(1.0, 0.1))
    prefill, decode = verdict(slow, static=False, compiled=False)
    assert prefill.startswith("prefill 20% slower than sdpa")
    assert "so short that fewer tokens save nothing" in prefill
    assert decode == "decode as fast as sdpa within the spread, 100% of the oracle's speed"


def test_bytes_are_in_words() -> None:
    assert [bytes_in_words(count) for count in (5, 2048, 3 << 20, 5 << 30)] == [
        "5 B",
        "2 KiB",
        "3 MiB",
        "5 GiB",
    ]


def test_the_command_measures_the_embedded_model(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result = cli(
        "bench",
        "--model",
        "embedded",
        "--keep",
        "0.25",
        "--rounds",
        "2",
        "--output-len",
        "2",
        "--json",
        str(path),
    )
    assert result.exit_code == 0, result.output
    assert "logits agree with the oracle's" in result.output
    report = json.loads(path.read_text())
    assert [row["variant"] for row in report["rows"]] == ["sdpa", "attached", "pruned", "oracle"]
    assert (report["visual_tokens"], report["batch"], report["error"] < SAME) == (64, 1, True)
    assert len(report["verdict"]) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give either --model or --config"),
        (("--model", "embedded", "--config", "smol"), "give either --model or --config"),
        (
            ("--model", "embedded", "--visual-tokens", "64"),
            "--visual-tokens does not go with --model: leave it out",
        ),
        (("--config", "smol", "--compile"), "--compile needs --cache static"),
        (
            ("--config", "smol", "--keep", "much"),
            "--keep 'much': expected a share such as 0.25 or a count such as 64",
        ),
        (
            ("--config", "smol", "--method", "fastv", "--layer", "3"),
            "--layer is part of a method: leave it out",
        ),
        (("--config", "smol", "--method", "slowv"), "slowv"),
        (
            ("--config", "smol", "--json", "no/such/r.json"),
            "--json 'no/such/r.json': expected a file in a folder",
        ),
        (("--config", "smol", "--device", "cuda"), "device 'cuda': PyTorch finds no GPU here"),
        (("--model", "no/such"), "model 'no/such' can't be loaded"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], sentence: str) -> None:
    result = cli("bench", *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.output.replace("│", " ").split())
