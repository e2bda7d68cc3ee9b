"""The benchmarks as programs: what they count, that they refuse wrong results, and that every part of them runs.

Nothing here judges a time. What needs CUDA runs against stand-ins, which shows that the code works and no more.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support import fake_cuda
from torch.autograd import DeviceType
from typer.testing import CliRunner

from bench import (
    agree,
    cuda,
    exact,
    floor,
    goals,
    gpu_check,
    harness,
    operators,
    outside,
    record,
    rivals,
    steps,
)
from bench import table as tables
from bench.shapes import TINY_DECODER, TINY_TOWER, Case, find, make_inputs
from bench.timing import device_events, eager, plan, quantiles, rotation

CPU = torch.device("cpu")
TINY = Case(TINY_DECODER, 2)
RATES = floor.Rates(bytes_per_us=1000.0, flops_per_us=1e6, launch_us={"eager": 2.0, "graph": 1.0})


class Timer:
    """Stands for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}

    def pedantic(self, target, rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds):
            target()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[0.001] * rounds))


@pytest.fixture
def bench(tmp_path: Path) -> harness.Bench:
    made = harness.Bench(CPU, 0.001, tmp_path / "rows.csv", record.machine(CPU))
    made.rates = RATES
    return made


def prune_subject() -> harness.Subject:
    return harness.Subject("prune_tokens", operators.prune_tokens, agree.same_pruning, floor.prune_work)


def test_every_benchmark_runs_and_lands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "pytest", "-q", "bench", "-k", "not compiled", "--csv", str(path)]
    code, output = outside.run(
        [*command, "--shapes", "tiny,tiny-tower", "--budget", "0.002", "--device", "cpu"], 200
    )
    assert code == 0, output
    assert "No GPU: times of the PyTorch reference on a CPU" in output
    assert "triton not timed: kernels need a CUDA GPU and Triton (" in output
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == record.COLUMNS
    assert all(value for line in lines for value in line.values())
    assert {line["mode"] for line in lines} == {"eager"}
    assert {line["launches"] for line in lines} == {"-"}
    timed = {(row.operator, row.implementation) for row in record.read(path)}
    assert timed >= {
        ("topk_indices", "torch.topk + sort"),
        ("visual_importance", "reference"),
        ("visual_importance, text rows", "reference"),
        ("visual_importance, lse", "reference"),
        ("prune_tokens", "fastv"),
        ("attention", "sdpa"),
        ("attention, importance", "reference without"),
        ("attention_received", "eager mean"),
        ("topk_per_region", "regions + torch.topk"),
        ("spatial_aggregate", "all weights"),
    }
    for row in record.read(path):
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.ratio == pytest.approx(row.median_us / row.floor_us, rel=1e-2)


def test_a_compiled_rival_agrees() -> None:
    x = make_inputs(TINY, torch.float32, CPU)
    expected = operators.topk_indices(x)
    assert torch.equal(rivals.compiled(rivals.plain_topk)(x)[0], expected[0])


def test_rivals_compute_what_the_operators_do() -> None:
    x = make_inputs(TINY, torch.float32, CPU)
    agree.same_pruning(x, operators.prune_tokens(x), rivals.fastv_prune(x), torch.float32)
    agree.same_pruning(x, operators.prune_tokens(x), rivals.plain_prune(x), torch.float32)
    agree.close(operators.attention(x)[0], rivals.sdpa(x)[0], torch.float32)
    tower = make_inputs(Case(TINY_TOWER, 2), torch.float32, CPU)
    agree.close(operators.attention_received(tower)[0], rivals.eager_received(tower)[0], torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (TINY_TOWER, find("clip-336"), find("siglip-384")):
            tower = make_inputs(Case(shape, 2), dtype, CPU)
            (ours,), (theirs,) = operators.spatial_aggregate(tower), rivals.dense_aggregate(tower)
            agree.close(ours, theirs, dtype)
            assert torch.equal(operators.topk_per_region(tower)[0], rivals.regions_and_topk(tower)[0])


@pytest.mark.parametrize("part", range(6))
def test_a_wrong_result_is_not_timed(bench: harness.Bench, part: int) -> None:
    def wrong(x):
        result = [tensor.clone() for tensor in operators.prune_tokens(x)]
        result[part][0, 0] += 1
        return tuple(result)

    with pytest.raises(AssertionError):
        bench.measure(Timer(), prune_subject(), TINY, harness.Contender("wrong", wrong))
    assert not bench.rows
    assert not bench.csv.exists()


def test_choices_may_differ_only_where_scores_tie() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.25, 0.1, 0.25 + 1e-6]])
    ours = torch.tensor([[0, 1]])
    agree.same_choice(ours, torch.tensor([[0, 2]]), scores, None)
    agree.same_choice(ours, torch.tensor([[0, 4]]), scores, torch.float32)
    with pytest.raises(AssertionError, match=r"1 of 2 indices differ, by 0\.15 in score"):
        agree.same_choice(ours, torch.tensor([[0, 3]]), scores, torch.float32)
    with pytest.raises(AssertionError, match="not ascending and distinct"):
        agree.same_choice(ours, torch.tensor([[1, 0]]), scores, None)
    with pytest.raises(AssertionError, match="a text row is missing"):
        agree.same_choice(torch.tensor([[0, 5]]), torch.tensor([[0, 6]]), scores, None)
    with pytest.raises(AssertionError, match="indices differ"):
        agree.same_choice(torch.tensor([[0, 4]]), ours, scores, None)


def test_the_same_scores_must_be_taken() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.25, 0.1]])
    agree.same_scores(torch.tensor([[0, 1]]), torch.tensor([[0, 2]]), scores)
    with pytest.raises(AssertionError, match="1 scores differ"):
        agree.same_scores(
            torch.tensor([[1, 3]]), torch.tensor([[1, 2]]), scores
        )  # a better one, but not asked for
    with pytest.raises(AssertionError, match="not ascending and distinct"):
        agree.same_scores(torch.tensor([[1, 2]]), torch.tensor([[1, 1]]), scores)


def test_small_scores_are_not_close_to_zero() -> None:
    scores = torch.full((1, 4), 1e-6)
    with pytest.raises(AssertionError):
        agree.close(scores, torch.zeros(1, 4), torch.bfloat16)


def test_counted_bytes_are_those_of_the_tensors() -> None:
    x = make_inputs(TINY, torch.bfloat16, CPU)
    pruned = operators.prune_tokens(x)
    rows = sum(tensor.nbytes for tensor in pruned[:4])
    read = x.query[:, :, -1].nbytes + x.key.nbytes + x.visual_index.nbytes + rows
    written = rows + pruned[4].nbytes + pruned[5].nbytes
    assert floor.prune_work(TINY, torch.bfloat16).bytes == read + written

    output, lse = operators.attention(x)
    moved = sum(tensor.nbytes for tensor in (x.query, x.key, x.value, output, lse))
    assert floor.attention_work(TINY, torch.bfloat16).bytes == moved

    text = (
        x.query[:, :, -TINY_DECODER.text :].nbytes + x.key.nbytes + x.text_rows.nbytes + x.visual_index.nbytes
    )
    counted = floor.importance_work(TINY, torch.bfloat16, rows=TINY_DECODER.text)
    assert counted.bytes == text + operators.visual_importance(x)[0].nbytes

    visual = x.key[:, :, : TINY_DECODER.visual].nbytes + x.query[:, :, -1].nbytes + x.lse.nbytes
    counted = floor.importance_work(TINY, torch.bfloat16, rows=1, lse=True)
    assert counted.bytes == visual + x.visual_index.nbytes + operators.visual_importance(x)[0].nbytes

    assert (
        floor.topk_work(TINY, torch.bfloat16).bytes == x.scores.nbytes + operators.topk_indices(x)[0].nbytes
    )

    tower_case = Case(TINY_TOWER, 2)
    tower = make_inputs(tower_case, torch.bfloat16, CPU)
    moved = tower.query.nbytes + tower.key.nbytes + operators.attention_received(tower)[0].nbytes
    assert floor.received_work(tower_case, torch.bfloat16).bytes == moved

    patches = TINY_TOWER.side**2
    moved = 4 * 2 * patches + tower.neighbours.nbytes + operators.topk_per_region(tower)[0].nbytes
    assert floor.region_work(tower_case, torch.bfloat16).bytes == moved

    features, similarity, side, radius = operators.aggregated(tower)
    moved = features.nbytes + similarity.nbytes + tower.anchors.nbytes + tower.pillars.nbytes
    work = floor.aggregate_work(tower_case, torch.bfloat16)
    assert work.bytes == moved + operators.spatial_aggregate(tower)[0].nbytes
    near = sum(
        math.dist(divmod(anchor, side), divmod(patch, side)) < radius
        for anchor in tower.anchors[~tower.pillars].tolist()
        for patch in range(patches)
    )
    assert work.flops == 2 * near * (features.shape[2] + similarity.shape[2])


def test_the_floor_is_the_larger_term_and_a_launch() -> None:
    assert RATES.floor_us(floor.Work(bytes=5000, flops=10), "eager") == 7.0
    assert RATES.floor_us(floor.Work(bytes=5, flops=9_000_000), "graph") == 10.0


def test_eager_times_are_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    functions = [lambda: calls.append(0), lambda: calls.append(1)]
    rotation(functions, 5, CPU)()
    assert calls == [0, 1, 0, 1, 0]
    assert plan(functions, CPU, 0.001).burst == 1
    monkeypatch.setattr(cuda, "is_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert plan(functions, CPU, 0.001).burst == 20
    sleeps = [functools.partial(time.sleep, 400e-6)]
    assert 1 < plan(sleeps, CPU, 0.001).burst <= 5
    assert 400 < min(eager(sleeps, CPU, 0.001)) < 790  # two calls take 800 us and more


def test_quantiles() -> None:
    found = quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (found.p20, found.median, found.p80) == pytest.approx((2.0, 3.5, 5.0))


def test_launches_are_what_ran_on_the_device() -> None:
    kernel = SimpleNamespace(device_type=DeviceType.CUDA, name="kernel")
    marked = SimpleNamespace(device_type=DeviceType.CUDA, name="range", is_user_annotation=True)
    host = SimpleNamespace(device_type=DeviceType.CPU, name="aten::add")
    assert device_events([host, kernel, marked, kernel]) == 2


def test_reasons_to_skip(bench: harness.Bench) -> None:
    wide = Case(find("qwen2.5-vl-video"), 1)
    assert bench.why_not(wide, harness.Contender("m", rivals.fastv_prune, matrix=True)) == (
        "the S x S matrix does not fit in memory"
    )
    assert bench.why_not(TINY, harness.Contender("m", rivals.fastv_prune, matrix=True)) == ""
    assert bench.why_not(TINY, harness.Contender("f", None)) == "not installed"
    assert "unrolled" in bench.why_not(wide, harness.compiled(rivals.plain_attention, max_tokens=4096))
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        bench.measure(Timer(), prune_subject(), TINY, harness.Contender("f", None))
    assert tables.skipped(bench.skips) == ["f not timed: not installed (prune_tokens tiny-b2)"]


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("date,time\n")
    with pytest.raises(ValueError, match="expected the columns date, commit, device"):
        record.append(path, record.machine(CPU), make_row())


def make_row(**fields: object) -> record.Row:
    values: dict[str, object] = {
        "operator": "prune_tokens",
        "shape": "llava-1.5",
        "batch": 1,
        "dtype": "bfloat16",
        "implementation": "triton",
        "mode": "graph",
        "median_us": 10.0,
        "p20_us": 9.0,
        "p80_us": 11.0,
        "bytes": 1000,
        "flops": 0,
        "launches": 1.0,
        "floor_us": 8.0,
        "ratio": 1.25,
    }
    return record.Row(**{**values, **fields})  # type: ignore[arg-type]


def test_rows_survive_the_file_and_stay_apart_from_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.csv"
    rows = [make_row(), make_row(launches=None, mode="eager")]
    for row in rows:
        record.append(path, record.machine(CPU), row)
    assert record.read(path) == rows
    assert path.read_text().count("date,") == 1


def test_goals_are_judged_by_the_rows_of_the_kernels() -> None:
    rows = [
        make_row(),
        make_row(implementation="reference", median_us=30.0),
        make_row(implementation="fastv", median_us=200.0),
        make_row(operator="attention, importance", median_us=22.0),
        make_row(operator="attention, importance", implementation="triton without", median_us=20.0),
        make_row(shape="llava-next", launches=3.0, ratio=3.0),
    ]
    verdicts = {(verdict.goal, verdict.where): verdict for verdict in goals.judge(rows)}
    here = "llava-1.5-b1"
    assert verdicts["prune_tokens is one launch", here].status == "met"
    assert verdicts["prune_tokens is one launch", "llava-next-b1"].factor == 3.0
    assert verdicts["prune_tokens takes at most 1.5 times its floor", "llava-next-b1"].status == "missed"
    assert verdicts["prune_tokens is twice as fast as PyTorch, graph", here].value == 3.0
    fastv = verdicts["prune_tokens is 30 times as fast as FastV's way", here]
    assert (fastv.status, fastv.factor) == ("missed", 1.5)
    assert verdicts["importance adds at most 10% to attention", here].status == "met"
    assert verdicts["prune_tokens is 5 times as fast as PyTorch, eager", ""].status == "not measured"
    assert all(v.status == "not measured" for v in goals.judge([make_row(implementation="reference")]))


def test_the_table_compares_within_a_group() -> None:
    rows = [
        make_row(implementation="fastv", median_us=40.0),
        make_row(),
        make_row(shape="other", median_us=1.0),
    ]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(tables.summary(rows, "a GPU", on_gpu=True))
    text = capture.get()
    assert "fastv 4.00" in text
    assert "No GPU" not in text


def test_graphs_in_the_harness(bench: harness.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    bench.measure(Timer(), prune_subject(), TINY, harness.ours(operators.prune_tokens)[1])
    assert [row.mode for row in bench.rows] == ["eager", "graph"]
    assert [row.dtype for row in bench.rows] == ["bfloat16"] * 2
    assert [row.floor_us - row.bytes / 1000 for row in bench.rows] == pytest.approx([2.0, 1.0])
    assert bench.number_of_sets(TINY, floor.Work(bytes=2**18, flops=0)) == 8
    assert bench.number_of_sets(TINY, floor.Work(bytes=1, flops=0)) == harness.MAX_SETS
    assert bench.number_of_sets(Case(find("qwen2.5-vl-video"), 8), floor.Work(bytes=2**30, flops=0)) == 1


def test_graph_step(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = steps.tiny(CPU)
    with pytest.raises(cuda.NeedsCuda, match="a CUDA graph needs CUDA, this is cpu"):
        steps.replay_graphs(settings)
    fake_cuda.install(monkeypatch)
    assert len(steps.replay_graphs(settings)["operators"]) == len(operators.DECODER_CALLS) + len(
        operators.TOWER_CALLS
    )

    monkeypatch.setattr(fake_cuda.FakeGraph, "replay", lambda graph: None)
    with pytest.raises(steps.StepFailed, match="prune_tokens: a replay differs from the eager call"):
        steps.replay_graphs(settings)


def test_steps_find_what_changes_from_launch_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = steps.tiny(CPU)
    launches = iter(range(10**9))
    right = operators.prune_tokens

    def drifting(x):
        *rest, scores = right(x)
        return *rest, scores * (1 + 1e-6 * (next(launches) == 20))

    monkeypatch.setattr(operators, "prune_tokens", drifting)
    with pytest.raises(steps.StepFailed, match=r"\d+ elements differ from the first launch"):
        steps.relaunch(settings)
    launches = iter([20] * 4 + [0] * 10**4)
    monkeypatch.setitem(operators.DECODER_CALLS, "prune_tokens", drifting)
    with pytest.raises(steps.StepFailed, match=r"results differ from one stream's: prune_tokens$"):
        steps.run_on_streams(settings)


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
    monkeypatch.setitem(calls, name, wrong)
    with pytest.raises(steps.StepFailed, match=f"{name}, .*: AssertionError"):
        steps.compare_with_float64(steps.tiny(CPU))


def test_differing_counts_bits() -> None:
    left = (torch.tensor([0.0, 1.0, float("nan")]), torch.tensor([1, 2]))
    right = (torch.tensor([-0.0, 1.0, float("nan")]), torch.tensor([1, 3]))
    assert int(exact.differing(left, left)) == 0
    assert int(exact.differing(left, right)) == 2


TESTS = """
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="not here")
def test_elsewhere(): pass
"""


def test_gpu_check_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_made.py").write_text(TESTS)
    planned = gpu_check.all_steps(
        steps.tiny(CPU),
        tmp_path / "rows.csv",
        lambda: 200.0,
        kernel_tests=("--noconftest", str(tmp_path / "test_made.py")),
        gpu_tests=("--noconftest", str(tmp_path / "test_made.py"), "-k", "right"),
        benchmark_arguments=("-k", "topk and not compiled", "--shapes", "tiny", "--budget", "0.001"),
    )
    path = tmp_path / "out" / "report.json"
    outcomes = gpu_check.check(planned, CPU, path)
    report = json.loads(path.read_text())
    status = {step["name"]: step["status"] for step in report["steps"]}
    assert status == {
        "machine": "passed",
        "float64": "passed",
        "kernel-tests": "failed",
        "gpu-tests": "passed",
        "relaunch": "passed",
        "streams": "passed",
        "graphs": "skipped",
        "host": "passed",
        "benchmarks": "passed",
        "memcheck": "skipped",
        "racecheck": "skipped",
    }
    assert report["complete"]
    assert report["failed"] == ["kernel-tests"]
    assert report["commit"]
    assert report["torch"] == torch.__version__
    found = {step["name"]: step["found"] for step in report["steps"]}
    assert [found["kernel-tests"][kind] for kind in ("passed", "failed", "skipped")] == [1, 1, 1]
    (failing,) = found["kernel-tests"]["failing"]
    assert failing["name"].endswith("::test_wrong")
    assert "one is not two" in failing["message"]
    assert found["relaunch"]["launches"] == 25
    assert found["float64"]["path"].startswith("reference")
    assert len(found["host"]["host_us"]) == len(operators.DECODER_CALLS) + len(operators.TOWER_CALLS)
    assert {row["implementation"] for row in found["benchmarks"]["rows"]} == {
        "reference",
        "torch.topk + sort",
    }
    assert {goal["status"] for goal in found["benchmarks"]["goals"]} == {"not measured"}
    assert "[11/11] racecheck ..." in capsys.readouterr().out
    assert len(gpu_check.tables(outcomes, "title")) == 2


def test_gpu_check_goes_on_after_a_failure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: steps.Settings) -> steps.Found:
        raise RuntimeError("a launch failed")

    monkeypatch.setattr(steps, "measure_machine", broken)
    options = ["--device", "cpu", "--relaunches", "20", "--only", "machine", "--only", "relaunch"]
    run = functools.partial(
        CliRunner().invoke, gpu_check.app, env={"GPU_CHECK_OUTPUT": str(tmp_path / "r.json")}
    )
    result = run(options)
    assert result.exit_code == 1
    assert "RuntimeError: a launch failed" in result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert [step["status"] for step in report["steps"]] == ["failed", "passed"]
    assert run([*options[:4], "--only", "relaunch", "--only", "gpu-tests"]).exit_code == 0
    assert run([*options[:4], "--only", "memcheck", "--budget", "1"]).exit_code == 0
    (step,) = json.loads((tmp_path / "r.json").read_text())["steps"]
    assert (step["status"], step["message"]) == ("skipped", "no time is left; raise --budget")
    result = run(["--only", "graph"])
    assert result.exit_code == 2
    assert "expected one of machine, float64" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("tool", "prints", "problem"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors", None),
        ("memcheck", "ERROR SUMMARY: 3 errors", "memcheck reports 3 problems"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", None),
        ("racecheck", "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", "reports 2 problems"),
        ("racecheck", "ERROR SUMMARY: 0 errors", "printed no summary"),
    ],
)
def test_sanitizer(tool: str, prints: str, problem: str | None, tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f'#!/bin/sh\necho "prune_tokens, tiny, torch.float32"\necho "{outside.DONE}"\necho "{prints}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if problem is None:
        assert outside.sanitize(tool, 20) == {"exit": 0, "problems": 0, "calls": 1}
        program.write_text(f'#!/bin/sh\necho "{prints}"\n')
        with pytest.raises(steps.StepFailed, match="not every operator was called"):
            outside.sanitize(tool, 20)
        program.write_text("#!/bin/sh\necho Device not supported\n")
        with pytest.raises(outside.NotAvailable):
            outside.sanitize(tool, 20)
        program.write_text("#!/bin/sh\nexec sleep 20\n")
        with pytest.raises(steps.StepFailed, match="ran past 1 s"):
            outside.sanitize(tool, 1)
    else:
        with pytest.raises(steps.StepFailed, match=problem):
            outside.sanitize(tool, 20)


def test_without_a_sanitizer_nothing_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(outside.NotAvailable, match="compute-sanitizer is not on the PATH"):
        outside.sanitize("memcheck", 1)


def test_pytest_that_breaks_or_runs_nothing_has_not_passed(tmp_path: Path) -> None:
    made = tmp_path / "test_made.py"
    made.write_text("import pytest\n\n@pytest.mark.skip\ndef test(): pass\n")
    with pytest.raises(steps.StepFailed, match="nothing ran"):
        outside.run_tests(("--noconftest", str(made)), 60)
    with pytest.raises(steps.StepFailed, match="nowhere"):
        outside.run_tests(("--noconftest", str(tmp_path / "nowhere.py")), 60)


INTERPRETED = """
import gap_kernels, torch
from gap_kernels.backends import triton_is_interpreted
from dataclasses import replace
from bench import small_calls, steps
assert triton_is_interpreted()
settings = replace(steps.tiny(torch.device("cpu")), relaunches=4, threads=1, repeats=1)
with gap_kernels.backend("triton"):
    found = steps.compare_with_float64(settings)
    assert found["path"] == "triton", found
    steps.relaunch(settings)
    steps.run_on_streams(settings)
print("the kernels ran")
"""


def test_steps_on_the_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    numpy, triton = pytest.importorskip("numpy"), pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and numpy.__version__ >= "2.4":
        pytest.skip("the interpreter of Triton before 3.7 can't loop to a scalar with numpy 2.4 or later")
    code, output = outside.run([sys.executable, "-c", INTERPRETED], 200, TRITON_INTERPRET="1")
    assert code == 0, output
    assert "the kernels ran" in output
