"""The benchmarks as programs: what they count, that they refuse wrong results, and that every part of them runs.

Nothing here judges a time. What needs CUDA runs against stand-ins, which shows that the code works and no more.
"""

from __future__ import annotations

import csv
import functools
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

from bench import agree, cuda, exact, floor, goals, harness, operators, outside, record, rivals
from bench import table as tables
from bench.machine import machine
from bench.shapes import TINY_DECODER, TINY_TOWER, Case, find, make_inputs
from bench.timing import device_events, eager, in_turn, plan, quantiles, rotation

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
    made = harness.Bench(CPU, 0.001, tmp_path / "rows.csv", machine(CPU))
    made.rates = RATES
    return made


def prune_subject() -> harness.Subject:
    return harness.Subject("prune_tokens", operators.prune_tokens, agree.same_pruning, floor.prune_work)


def test_every_benchmark_runs_and_lands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "pytest", "-q", "bench", "-k", "not compiled", "--csv", str(path)]
    ended = outside.run(
        [*command, "--shapes", "tiny,tiny-tower", "--budget", "0.002", "--device", "cpu"], 200
    )
    assert ended.status == 0, ended.output
    assert "No GPU: times of the PyTorch reference on a CPU" in ended.output
    assert "triton not timed: kernels need a CUDA GPU and Triton (" in ended.output
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
    assert 400 < min(eager(sleeps, CPU, 0.05)) < 790  # two calls take 800 us and more


def test_ways_take_turns() -> None:
    calls: list[str] = []

    def way(name: str):
        def run() -> None:
            calls.append(name)
            time.sleep(1e-4)

        return run

    times = in_turn({"a": [way("a")], "b": [way("b")]}, CPU, 0.004)
    assert len(times["a"]) == len(times["b"]) >= 5
    assert "".join(calls).endswith("ab" * len(times["a"]))


def test_quantiles() -> None:
    found = quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (found.p20, found.median, found.p80) == pytest.approx((2.0, 3.5, 5.0))


def test_launches_are_what_ran_on_the_device() -> None:
    kernel = SimpleNamespace(device_type=DeviceType.CUDA, name="kernel")
    marked = SimpleNamespace(device_type=DeviceType.CUDA, name="range", is_user_annotation=True)
    host = SimpleNamespace(device_type=DeviceType.CPU, name="aten::add")
    assert device_events([host, kernel, marked, kernel]) == ["kernel", "kernel"]


def test_reasons_to_skip(bench: harness.Bench) -> None:
    wide = Case(find("qwen2.5-vl-video"), 1)
    assert bench.why_not(wide, harness.Contender("m", rivals.fastv_prune, matrix=True)) == (
        "the S x S matrix does not fit in memory"
    )
    assert bench.why_not(TINY, harness.Contender("m", rivals.fastv_prune, matrix=True)) == ""
    assert bench.why_not(TINY, harness.Contender("f", None)) == "not installed"
    narrow = harness.Contender("c", rivals.eager_received, max_head_dim=64)
    assert bench.why_not(wide, narrow) == "it reads the first 64 columns of a head only"
    assert bench.why_not(TINY, narrow) == ""
    assert "unrolled" in bench.why_not(wide, harness.compiled(rivals.plain_attention, max_tokens=4096))
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        bench.measure(Timer(), prune_subject(), TINY, harness.Contender("f", None))
    assert tables.skipped(bench.skips) == ["f not timed: not installed (prune_tokens tiny-b2)"]


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("date,time\n")
    with pytest.raises(ValueError, match="expected the columns date, commit, device"):
        record.append(path, machine(CPU), make_row())


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
        record.append(path, machine(CPU), row)
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
    verdicts = {
        (verdict.goal, verdict.where): verdict for verdict in goals.judge(list(map(goals.of_row, rows)))
    }
    here = "llava-1.5-b1"
    assert verdicts["prune_tokens is one launch", here].status == "met"
    assert verdicts["prune_tokens is one launch", "llava-next-b1"].factor == 3.0
    assert verdicts["prune_tokens takes at most 1.5 times its floor", "llava-next-b1"].status == "missed"
    assert verdicts["prune_tokens is twice as fast as PyTorch, graph", here].value == 3.0
    fastv = verdicts["prune_tokens is 30 times as fast as FastV's way", here]
    assert (fastv.status, fastv.factor) == ("missed", 1.5)
    assert verdicts["importance adds at most 10% to attention", here].status == "met"
    assert verdicts["prune_tokens is 5 times as fast as PyTorch, eager", ""].status == "not measured"
    reference = goals.of_row(make_row(implementation="reference"))
    assert all(verdict.status == "not measured" for verdict in goals.judge([reference]))


def test_a_pruned_model_is_judged_by_the_oracle() -> None:
    def measured(way: str, us: float) -> goals.Measured:
        return goals.Measured("prefill", "llama-7b", "eager", way, us)

    verdicts = goals.judge(
        [measured("unpruned", 300.0), measured("pruned", 126.0), measured("oracle", 100.0)]
    )
    (verdict,) = [verdict for verdict in verdicts if verdict.status != "not measured"]
    assert (verdict.status, verdict.value) == ("missed", 1.26)
    assert verdict.factor == pytest.approx(1.2)


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


def test_differing_counts_bits() -> None:
    left = (torch.tensor([0.0, 1.0, float("nan")]), torch.tensor([1, 2]))
    right = (torch.tensor([-0.0, 1.0, float("nan")]), torch.tensor([1, 3]))
    assert int(exact.differing(left, left)) == 0
    assert int(exact.differing(left, right)) == 2
