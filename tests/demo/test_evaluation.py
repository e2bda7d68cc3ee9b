"""`gap-triton eval`: the arithmetic of its tables, what has a row, what is written, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from support.command_line import cli
from support.methods import BY_TOWER

import gap_triton.demo.evaluation
from gap_triton import GapConfig, Stage
from gap_triton.demo import measuring, table
from gap_triton.demo.architectures import QWEN2_5_VL
from gap_triton.demo.compare import Comparison, compare
from gap_triton.demo.coverage import coverage_cases, coverage_markdown
from gap_triton.demo.evaluation import Evaluation, sweep_configs
from gap_triton.demo.intervals import paired_difference, wilson_interval
from gap_triton.demo.methods import Refusal, method_cases, methods_markdown
from gap_triton.demo.report import markdown_of
from gap_triton.demo.run import load_embedded_model
from gap_triton.demo.scenes import SPLITS, held_out
from gap_triton.demo.table import UNPRUNED, Row, method_name, prefill_cost
from gap_triton.presets import PRESETS
from training.build import build_model

SHARES = (0.5, 0.25, 0.125)


@pytest.fixture(scope="module")
def llava():
    return load_embedded_model(torch.device("cpu"))


@pytest.fixture
def one_round(monkeypatch) -> None:
    """Prefill times of a single round: what the tests look at does not depend on them."""
    monkeypatch.setattr(table, "PREFILL_ROUNDS", 1)


# --------------------------------------------------------------------------------------------- intervals
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (1, 512, 0.000345, 0.01097)],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    # Values of R's prop.test(..., correct = FALSE).
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("trials", range(1, 65))
def test_wilson_interval_holds_the_share(trials: int) -> None:
    for successes in range(trials + 1):
        low, high = wilson_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_interval_refuses(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"successes={successes}, trials={trials}"):
        wilson_interval(successes, trials)


def test_a_fresh_sample_falls_inside_an_interval_83_times_of_100() -> None:
    """Two samples scatter by the root of 2 more than one about the truth. It is what docs/methods.md says."""
    hits = torch.binomial(
        torch.full((2, 4000), 2048.0), torch.tensor(0.6), generator=torch.Generator().manual_seed(0)
    )
    inside = 0
    for first, second in hits.int().T.tolist():
        low, high = wilson_interval(first, 2048)
        inside += low <= second / 2048 <= high
    assert inside / 4000 == pytest.approx(math.erf(1.959964 / 2), abs=0.02)
    assert math.erf(1.959964 / 2) == pytest.approx(0.834, abs=1e-3)


def answers(both: int, first_only: int, second_only: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two ways that answer so many scenes right, in mixed order."""
    first = torch.tensor([1] * (both + first_only) + [0] * (second_only + neither)).bool()
    second = torch.tensor([1] * both + [0] * first_only + [1] * second_only + [0] * neither).bool()
    order = torch.randperm(len(first))
    return first[order], second[order]


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Airway hyper-responsiveness before and after transplantation, in Fagerland, Lydersen and Laake,
        # Statistics in Medicine 33, 2014, 2850-2875, as that paper gives it for this interval.
        ((1, 1, 7, 12), -0.507, -0.026),
        # The first example in Newcombe, Statistics in Medicine 17, 1998, 2635-2650.
        ((36, 12, 2, 0), 0.0569, 0.3404),
    ],
)
def test_paired_interval_is_the_published_one(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    found = paired_difference(*answers(*counts))
    assert found.value == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert (found.first_only, found.second_only) == counts[1:3]
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize("counts", [(300, 90, 60, 62), (100, 300, 12, 100), (20, 160, 140, 192)])
def test_paired_interval_agrees_with_a_bootstrap_over_scenes(counts: tuple[int, int, int, int]) -> None:
    first, second = answers(*counts)
    found = paired_difference(first, second)
    draws = torch.randint(len(first), (20_000, len(first)))
    resampled = (first.float() - second.float())[draws].mean(1)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975])).tolist()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    # It is the pairing that makes it narrow: as if on other scenes each, it would be wider where answers go together.
    if counts[0] * counts[3] > counts[1] * counts[2]:
        (one, other), n = (sum(counts[:2]), counts[0] + counts[2]), len(first)
        unpaired = 1.96 * math.sqrt(sum(x / n * (1 - x / n) / n for x in (one, other)))
        assert found.high - found.low < 2 * unpaired


def test_paired_interval_of_swapped_ways_is_mirrored() -> None:
    first, second = answers(31, 9, 20, 40)
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


@pytest.mark.parametrize("counts", [(0, 0, 0, 64), (64, 0, 0, 0), (30, 0, 0, 34), (0, 64, 0, 0)])
def test_paired_interval_keeps_a_width(counts: tuple[int, int, int, int]) -> None:
    found = paired_difference(*answers(*counts))
    assert -1 <= found.low < found.high <= 1
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_paired_difference_refuses(shapes) -> None:
    with pytest.raises(ValueError, match="expected one \\[N\\], N >= 1, for both"):
        paired_difference(*(torch.zeros(shape, dtype=torch.bool) for shape in shapes))


# --------------------------------------------------------------------------------------------- rows and comparisons
def row(method: str, ids: str, ious: torch.Tensor, keep: float = 0.5, **fields: object) -> Row:
    hits = int((ious >= 0.5).sum())
    low, high = wilson_interval(hits, len(ious))
    rest = dict.fromkeys(("mean_iou", "prefill_ratio", "tokens_mean", "tokens_kept", "kv_bytes"), 1)
    rest |= {"model": "llava", "config": {"score": "cls", "layer": -1, "coverage": "topk"}}
    return Row(
        method=method,
        keep=keep,
        ids=ids,
        accuracy=hits / len(ious),
        accuracy_low=low,
        accuracy_high=high,
        **{**rest, **fields},
    )


def test_compare_pairs_the_right_rows() -> None:
    ious = [torch.rand(40) for _ in range(6)]
    rows = [
        row("no pruning", "kept", ious[0], keep=1.0),
        row("nuwa", "kept", ious[1]),
        row("nuwa", "compacted", ious[2]),
        row("cls", "kept", ious[3]),
        row("cls", "compacted", ious[4]),
        row("nuwa", "kept", ious[5], keep=0.25),
    ]
    found = compare(rows, ious, lambda _: "cls")
    expected = [  # method, keep, against, its ids, and whose answers
        ("nuwa", 0.5, "nuwa", "compacted", 1, 2),
        ("nuwa", 0.5, "cls", "kept", 1, 3),
        ("cls", 0.5, "cls", "compacted", 3, 4),
    ]
    assert [(c.method, c.keep, c.against, c.against_ids) for c in found] == [line[:4] for line in expected]
    for comparison, (*_, one, other) in zip(found, expected, strict=True):
        assert comparison.value == pytest.approx(rows[one].accuracy - rows[other].accuracy)
        only = (ious[one] >= 0.5) & (ious[other] < 0.5)
        assert comparison.first_only == int(only.sum())


def test_cost_is_what_the_cache_holds(llava, one_round) -> None:
    two_stages = GapConfig(0.5, -1, "random", then=(Stage(0.125, 3, "last_token"),))
    configs = [UNPRUNED, GapConfig(0.25, 1, "text"), two_stages, GapConfig(10, -1, "cls")]
    costs = prefill_cost(*llava, held_out(3), configs)
    assert [cost.tokens_kept for cost in costs] == [64, 16, 8, 10]
    # Of six layers, those up to the pruning layer hold what came before.
    means = [64, (2 * 64 + 4 * 16) / 6, (4 * 32 + 2 * 8) / 6, 10]
    assert [cost.tokens_mean for cost in costs] == pytest.approx(means)
    text = 1 + 5  # beginning of sequence, "where is the red triangle"
    row_bytes = 6 * 2 * 128 * 4
    assert [cost.kv_bytes for cost in costs] == [round((mean + text) * row_bytes) for mean in means]
    assert costs[0].prefill_ratio == 1.0


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GapConfig(1.0), "no pruning"),
        (GapConfig(1.0, 1, ids="permuted"), "text, layer 1"),
        (GapConfig(0.5, 1, "text"), "text, layer 1"),
        (GapConfig(0.5, -1, "random"), "random, before the decoder"),
        (
            GapConfig.preset("nuwa", budget=0.5, layers=6),
            "cls by region + aggregation, before the decoder; last_token, layer 2",
        ),
    ],
)
def test_method_name(config: GapConfig, name: str) -> None:
    assert method_name(config) == name


# --------------------------------------------------------------------------------------------- what is measured
def test_every_preset_has_a_row_for_every_share(llava) -> None:
    cases, refused = method_cases(llava[0], list(PRESETS), SHARES)
    assert not refused
    assert [(case.method, case.keep, case.config.ids) for case in cases] == [
        (name, share, ids) for name in PRESETS for share in SHARES for ids in ("kept", "compacted")
    ]
    for kept, compacted in zip(cases[::2], cases[1::2], strict=True):
        assert kept.config != compacted.config
        assert {**vars(kept.config), "ids": "compacted"} == vars(compacted.config)
        assert all(stage.layer < 5 for stage in kept.config.stages)
    # HiPrune ranks by it also where there is a CLS token.
    assert {case.method for case in cases if case.config.score == "received"} == {"hiprune"}
    hiprune = [
        row("hiprune", ids, torch.zeros(4), config={"score": "received"}) for ids in ("kept", "compacted")
    ]
    unpruned = row("no pruning", "kept", torch.zeros(4), keep=1.0)
    gain = Comparison("llava", 0.5, "hiprune", "kept", "hiprune", "compacted", 0.0, -0.1, 0.1, 0, 0)
    assert "CLS" not in methods_markdown([unpruned, *hiprune], [gain], [])


def test_every_preset_has_a_row_or_a_reason_for_a_count(llava) -> None:
    cases, refused = method_cases(llava[0], list(PRESETS), [16])
    assert {case.method for case in cases} | {each.method for each in refused} == set(PRESETS)
    assert {each.method for each in refused} == {
        *("pyramiddrop", "sparsevlm", "sparsevlm+", "feather", "swiftvlm")
    }
    assert all(each.model == "llava" and "budget=16" in each.reason for each in refused)


def test_without_cls_token_attention_received_ranks() -> None:
    model = build_model(QWEN2_5_VL).eval()
    model.set_attn_implementation("gap_triton")
    cases, refused = method_cases(model, list(PRESETS), SHARES)
    assert not refused
    assert len(cases) == len(PRESETS) * len(SHARES) * 2
    first = {case.method: case.config.score for case in cases}
    assert {name for name, score in first.items() if score == "received"} == set(BY_TOWER)
    assert not any(case.config.score == "cls" for case in cases + coverage_cases(model, SHARES))
    named = methods_markdown(
        [
            row("no pruning", "kept", torch.zeros(4), keep=1.0, model="qwen2_5_vl"),
            *(
                row("cls", ids, torch.zeros(4), model="qwen2_5_vl", config={"score": "received"})
                for ids in ("kept", "compacted")
            ),
        ],
        [Comparison("qwen2_5_vl", 0.5, "cls", "kept", "cls", "compacted", 0.0, -0.1, 0.1, 0, 0)],
        [],
    )
    assert named.startswith("**qwen2_5_vl**, no pruning: accuracy 0.000")
    assert 'methods that rank by the CLS token use `score="received"` here' in named


def test_coverage_crosses_everything(llava) -> None:
    cases = coverage_cases(llava[0], SHARES)
    assert len({case.config for case in cases}) == len(cases) == 2 * 3 * 4 * 3
    assert {(case.config.layer, case.config.score) for case in cases} == {
        *[(1, "text"), (1, "random"), (-1, "cls"), (-1, "random")]
    }
    assert {case.config.coverage for case in cases} == {"topk", "region", "stride"}


def test_sweep_leaves_out_what_does_not_exist() -> None:
    scores = ("text", "key_norm", "cls", "random")
    found = [(c.layer, c.score) for c in sweep_configs([-1, 2], scores, [0.5], ["kept"])]
    assert found == [
        *[(-1, "random"), (-1, "key_norm"), (-1, "cls")],
        *[(2, "text"), (2, "key_norm"), (2, "random")],
    ]
    with pytest.raises(ValueError, match="score 'cls' exists after the vision encoder only: add layer -1"):
        sweep_configs([0, 1], ["text", "cls"], [0.5], ["kept"])


def test_a_sweep_crosses_scores_and_coverages() -> None:
    """But by max-min distance no score plays a part, and no decoder layer removes duplicates."""
    scores, coverages = ("key_norm", "random"), ("topk", "max_min", "distinct")
    found = [
        (c.layer, c.score, c.coverage) for c in sweep_configs([-1, 2], scores, [0.5], ["kept"], coverages)
    ]
    assert found == [
        *[(-1, "key_norm", coverage) for coverage in coverages],
        *[(-1, "random", "topk"), (-1, "random", "distinct")],
        *[(2, "key_norm", "topk"), (2, "key_norm", "max_min"), (2, "random", "topk")],
    ]
    powers = sweep_configs([-1], ["random"], [0.5], ["kept"], ["topk", "determinant"], [2.0, 4.0])
    assert [(c.coverage, c.exponent) for c in powers] == [
        *[("topk", 1.0), ("determinant", 2.0), ("determinant", 4.0)]
    ]
    assert method_name(powers[1]) == "random by determinant ^ 2, before the decoder"
    with pytest.raises(ValueError, match="coverage 'distinct' exists after the vision encoder only: add"):
        sweep_configs([0, 1], ["text"], [0.5], ["kept"], ["topk", "distinct"])


# --------------------------------------------------------------------------------------------- the command
def test_eval_of_methods(tmp_path, one_round) -> None:
    folder = tmp_path / "new"
    options = ("--methods", "nuwa,cls,feather", "--budgets", "0.5,16", "--samples", "6")
    result = cli("eval", *options, "--output", str(folder))
    assert result.exit_code == 0, (result.output, result.exception)

    methods = json.loads((folder / "methods.json").read_text())
    rows = [Row(**each) for each in methods["rows"]]
    names = [("nuwa", 0.5), ("nuwa", 16), ("cls", 0.5), ("cls", 16), ("feather", 0.5)]
    assert [(r.method, r.keep, r.ids) for r in rows[1:]] == [
        (*name, ids) for name in names for ids in ("kept", "compacted")
    ]
    assert [(each["method"], each["keep"]) for each in methods["refused"]] == [("feather", 16)]
    comparisons = [Comparison(**each) for each in methods["comparisons"]]
    assert len(comparisons) == 5 + 3
    by = {(r.method, r.keep, r.ids): r for r in rows}
    for each in comparisons:
        first, second = by[each.method, each.keep, each.ids], by[each.against, each.keep, each.against_ids]
        assert each.value == pytest.approx(first.accuracy - second.accuracy)
        assert each.first_only - each.second_only == round(each.value * 6)
    refused = [Refusal(**each) for each in methods["refused"]]
    text = (folder / "methods.md").read_text()
    assert text == methods_markdown(rows, comparisons, refused)
    assert "| nuwa | 16 tokens | 16.0 |" in text
    assert "| llava | feather | 16 tokens | budget=16: expected a share" in text
    assert "no row: llava, feather" in result.output

    with Image.open(folder / "methods.png") as picture:
        assert min(picture.size) > 200
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".jsonl", ".md", ".png"]
    assert (methods["split"], methods["seeds"]) == ("report", [SPLITS["report"], SPLITS["report"] + 1])


def test_eval_of_both_models(tmp_path, one_round) -> None:
    options = ("--methods", "cls", "--budgets", "0.25", "--samples", "2", "--output", str(tmp_path))
    result = cli("eval", *options, "--model", "all")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert [(each["model"], each["ids"]) for each in rows] == [
        (model, ids) for model in ("llava", "qwen2_5_vl") for ids in ("kept", "kept", "compacted")
    ]
    assert [each["config"]["score"] for each in rows[1::3]] == ["cls", "received"]
    assert {each["tokens_mean"] for each in rows[1::3]} == {16.0}


def test_eval_goes_on_where_it_was_broken_off(tmp_path, one_round, monkeypatch) -> None:
    ran = []
    real = measuring.evaluate_batches
    monkeypatch.setattr(measuring, "evaluate_batches", lambda *a, **k: ran.append(1) or real(*a, **k))
    options = ("--methods", "cls,random", "--budgets", "0.5", "--samples", "3", "--output", str(tmp_path))
    assert cli("eval", *options).exit_code == 0
    assert len(ran) == 5
    log, results = tmp_path / "measured-llava.jsonl", (tmp_path / "methods.json").read_text()
    whole = log.read_text().splitlines()
    assert len(whole) == 5
    # Broken off inside the fourth configuration: what is whole counts, and the rest is measured.
    log.write_text("\n".join(whole[:3]) + "\n" + whole[3][:200])
    assert cli("eval", *options, "--resume").exit_code == 0
    assert len(ran) == 5 + 2
    again = [json.loads(text)["rows"] for text in ((tmp_path / "methods.json").read_text(), results)]
    assert again[0][:3] == again[1][:3]
    for row, other in zip(*again, strict=True):
        assert {**row, "prefill_ratio": 0} == {**other, "prefill_ratio": 0}
    # Another model beside it, then the tables of both, without a further run.
    assert cli("eval", *options, "--model", "qwen2_5_vl").exit_code == 0
    assert cli("eval", *options, "--model", "all", "--resume").exit_code == 0
    assert len(ran) == 7 + 5
    assert len(json.loads((tmp_path / "methods.json").read_text())["rows"]) == 10
    refused = cli("eval", *options, "--samples", "4", "--resume")
    assert refused.exit_code == 2
    assert "--resume" in refused.output
    assert "'samples': 3" in " ".join(refused.output.replace("│", "").split())
    # Without it, all is measured anew.
    assert cli("eval", *options, "--samples", "4").exit_code == 0
    assert len(ran) == 12 + 5


def test_one_configuration_is_measured_once_for_all_tables(tmp_path, one_round, monkeypatch) -> None:
    ran = []
    real = measuring.evaluate_batches
    monkeypatch.setattr(measuring, "evaluate_batches", lambda *a, **k: ran.append(1) or real(*a, **k))
    options = ("--methods", "cls,random,spatial", "--coverage", "--budgets", "0.5", "--samples", "2")
    result = cli("eval", *options, "--output", str(tmp_path))
    assert result.exit_code == 0, (result.output, result.exception)
    # No pruning, three methods and eight cells of coverage by their id rules; of the cells two are such methods.
    assert len(ran) == 1 + 3 * 2 + (8 * 3 - 2 * 2)
    rows = [json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("methods", "coverage")]
    assert rows[0][0] == rows[1][0]
    assert [row["method"] for row in rows[0][1:3]] == ["cls", "cls"]
    assert "cls, before the decoder" in {row["method"] for row in rows[1]}


def test_eval_of_coverage(tmp_path, one_round) -> None:
    result = cli("eval", "--coverage", "--budgets", "0.5", "--samples", "4", "--output", str(tmp_path))
    assert result.exit_code == 0, (result.output, result.exception)
    coverage = json.loads((tmp_path / "coverage.json").read_text())
    rows = [Row(**each) for each in coverage["rows"]]
    assert len(rows) == 1 + 2 * 4 * 3
    comparisons = [Comparison(**each) for each in coverage["comparisons"]]
    assert len(comparisons) == 2 * (4 + 3)
    plain = {"layer 1": "text, layer 1", "before the decoder": "cls, before the decoder"}
    for each in comparisons:
        own = each.method if each.against_ids == "compacted" else plain[each.method.split(", ")[1]]
        assert each.against == own
    text = (tmp_path / "coverage.md").read_text()
    assert text == coverage_markdown(rows, comparisons)
    for place in ("layer 1, by text", "before the decoder, by cls"):
        for name in ("topk", "region", "stride", "random"):
            assert text.count(f"| {place} | 50% | {name} |") == 1
    with Image.open(tmp_path / "coverage.png") as picture:
        assert min(picture.size) > 300


def test_eval_sweeps_layers_and_scores(tmp_path, one_round) -> None:
    options = ("--layers=-1,2", "--keeps", "0.5,16", "--samples", "4", "--output", str(tmp_path))
    result = cli("eval", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [Row(**each) for each in json.loads((tmp_path / "eval.json").read_text())["rows"]]
    assert [r.method for r in rows] == [
        "no pruning",
        *["random, before the decoder"] * 6,
        *["text, layer 2"] * 6,
    ]
    text = (tmp_path / "eval.md").read_text()
    assert text == markdown_of(rows)
    assert text.count("\n") == 2 + len(rows)
    assert "| text, layer 2 | 16 tokens | 16 | permuted |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "eval.json",
        "eval.md",
        "measured-llava.jsonl",
    ]


def test_eval_sweeps_ids_with_nothing_dropped(tmp_path, one_round) -> None:
    options = (
        "--layers=-1",
        "--scores",
        "text_similarity",
        "--ids",
        "kept,compacted,permuted,reordered,stretched",
    )
    result = cli("eval", *options, "--budgets", "1.0,0.5", "--samples", "4", "--output", str(tmp_path))
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [Row(**each) for each in json.loads((tmp_path / "eval.json").read_text())["rows"]]
    rules = ["compacted", "permuted", "reordered", "stretched"]
    assert [(r.keep, r.ids) for r in rows[1:]] == [
        *((1.0, rule) for rule in rules), *((0.5, rule) for rule in ("kept", *rules))
    ]  # fmt: skip
    assert rows[0].method == "no pruning"
    assert {r.method for r in rows[1:]} == {"text_similarity, before the decoder"}
    assert {r.tokens_kept for r in rows[:5]} == {64}
    assert (
        "| text_similarity, before the decoder | 100% | 64 | permuted |" in (tmp_path / "eval.md").read_text()
    )


def test_a_sweep_ranks_by_attention_received_where_there_is_no_cls(monkeypatch) -> None:
    monkeypatch.setattr(gap_triton.demo.evaluation, "score_without_cls", lambda model: True)
    evaluation = Evaluation(Console(), Path("unused"), 1, ["llava"])
    evaluation.add_sweep(sweep_configs([-1], ["cls", "received", "random"], [0.5], ["kept"]))
    (job,) = evaluation._jobs
    assert [case.method for case in job.cases] == [
        "received, before the decoder",
        "random, before the decoder",
    ]


def test_a_sweep_of_one_id_rule_has_a_line_for_each_method() -> None:
    ious = torch.rand(8)
    rows = [
        row(method, "kept", ious * factor, keep=keep, kv_bytes=2048 * number)
        for number, (method, keep, factor) in enumerate(
            [("no pruning", 1.0, 2), ("a", 0.5, 1.5), ("a", 8, 1), ("b", 0.5, 1), ("b", 8, 0)]
        )
    ]
    lines = markdown_of(rows).splitlines()
    assert lines[0].startswith("Ids kept; no pruning: accuracy ")
    assert lines[2] == "| method | accuracy at 50% | accuracy at 8 tokens | prefill time | KV cache |"
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| a", "| b"]
    assert lines[5].endswith("| 0.000 (0.000 to 0.324) | 1.00x / 1.00x | 6 KiB / 8 KiB |")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budgets", "half"], "--budgets 'half': expected a share such as 0.25 or a count such as 64"),
        (["--budgets", "2.0"], "GapConfig.keep=2.0"),
        (["--methods", "cls", "--budgets", "0.5,1.0"], "--budgets 1.0 drops nothing"),
        (["--coverage", "--budgets", "1.0"], "--budgets 1.0 drops nothing"),
        (["--ids", "kept", "--budgets", "1.0"], "ids 'kept' and budget 1.0 are no pruning"),
        (["--methods", "nuwa,best"], "--methods 'best': expected all, or of prumerge, prumerge+, trim"),
        (["--methods", ""], "--methods '': expected all, or of prumerge"),
        (
            ["--methods", "feather", "--budgets", "16"],
            "--methods: nothing to measure: budget=16: expected a share",
        ),
        (["--model", "llama"], "--model 'llama': expected all, or of llava, qwen2_5_vl"),
        (["--methods", "all", "--layers", "1"], "--layers belongs to the sweep"),
        (["--coverage", "--scores", "text"], "--scores belongs to the sweep"),
        (["--layers", "one"], "--layers 'one': expected comma-separated ints such as -1,0,1"),
        (["--layers", "5"], "this model's decoder has 6 layers"),
        (
            ["--layers", "1", "--scores", "cls"],
            "score 'cls' exists after the vision encoder only: add layer -1",
        ),
        (["--scores", "best"], "GapConfig.score='best'"),
        (["--coverages", "best"], "GapConfig.coverage='best'"),
        (["--exponents", "1,a"], "--exponents '1,a': expected comma-separated numbers"),
        (["--ids", "shifted"], "GapConfig.ids='shifted'"),
        (["--coverage", "--budgets", "0"], "GapConfig.keep=0"),
        (["--samples", "0"], "--samples"),
        (
            ["--samples", "17179869185"],
            "count is 17179869185; it must be at least 1, and at most 17179869184",
        ),
        (["--split", "training"], "'training': expected one of development, choice, report, sealed"),
    ],
)
def test_eval_refuses(tmp_path, monkeypatch, options: list[str], message: str) -> None:
    monkeypatch.setattr(gap_triton.demo.evaluation.Evaluation, "run", lambda self, log: pytest.fail("it ran"))
    result = cli("eval", *options, "--output", str(tmp_path / "new"))
    assert result.exit_code != 0
    assert message in " ".join(result.output.replace("│", "").split())
    assert not (tmp_path / "new").exists()
