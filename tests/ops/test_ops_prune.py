"""Pruning against a plain Python loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import PrunedTokens, prune_by_score, prune_tokens, visual_importance
from hypothesis import given, settings
from hypothesis import strategies as st
from support.naive.prune import check_rows, oracle
from torch import Tensor

NAN = math.nan


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows_of(
    batch: int, num_rows: int, axes: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Row tensors in which every value tells its sample and its row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(batch * num_rows).reshape(batch, num_rows) * 10
    if axes is not None:
        ids = torch.stack([ids + axis for axis in range(axes)])
    return {
        "hidden_states": torch.randn(batch, num_rows, 6, generator=generator).to(dtype),
        "cos": torch.randn(batch, num_rows, 4, generator=generator),
        "sin": torch.randn(batch, num_rows, 4, generator=generator),
        "position_ids": ids,
    }


def check(
    scores: list[list[float]],
    visual_index: list[list[int]],
    keep: int | list[int],
    num_rows: int,
    mask: list[list[bool]] | None = None,
    **row_options: Any,
) -> PrunedTokens:
    batch = len(scores)
    expected = oracle(scores, visual_index, [keep] * batch if isinstance(keep, int) else keep, num_rows, mask)
    rows = rows_of(batch, num_rows, **row_options)
    score = torch.tensor(scores, dtype=torch.float32).reshape(batch, -1)
    visual = torch.tensor(visual_index, dtype=torch.int64).reshape(batch, -1)
    count = keep if isinstance(keep, int) else torch.tensor(keep)
    attention_mask = None if mask is None else torch.tensor(mask)
    longest = max(len(row) for row in expected)
    for length in (None, longest, longest + 2, num_rows + 3):
        pruned = prune_by_score(
            score, **rows, visual_index=visual, keep=count, attention_mask=attention_mask, length=length
        )
        check_rows(pruned, rows, expected, longest if length is None else length)
        assert pruned.scores is score
    return pruned


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, 9])
def test_one_image(keep: int) -> None:
    check([[0.1, 0.4, 0.3, 0.2]], [[2, 3, 4, 5]], keep, 8)


@pytest.mark.parametrize("axes", [None, 1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_position_ids_and_dtypes(axes: int | None, dtype: torch.dtype) -> None:
    check([[0.1, 0.4, 0.3], [0.5, 0.1, 0.2]], [[1, 2, 3], [2, 3, 4]], 2, 6, axes=axes, dtype=dtype)


def test_several_images_in_any_order() -> None:
    check(
        [[0.1, 0.9, 0.3, 0.8, 0.2], [0.3, 0.1, 0.2, 0.5, 0.4]],
        [[1, 2, 6, 7, 8], [8, 2, 6, 1, 4]],
        2,
        10,
    )


def test_ragged_batch_with_samples_without_images() -> None:
    check(
        [[0.1, 0.9, 0.3], [9.0, 0.5, 9.0], [9.0, 9.0, 9.0]],
        [[1, 2, 3], [-1, 4, -1], [-1, -1, -1]],
        [1, 5, 2],
        7,
    )


def test_no_visual_tokens_at_all() -> None:
    check([[], []], [[], []], 3, 4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coverage", ["region", "stride"])
def test_no_visual_tokens_to_cover(coverage: str, masked: bool, generator: torch.Generator) -> None:
    rows, inputs = rows_of(2, 9), attention_inputs(3)
    mask = torch.tensor([[False] * 2 + [True] * 7, [True] * 9]) if masked else None
    expected = [[row for row in range(9) if mask is None or mask[sample, row]] for sample in range(2)]
    none = torch.zeros(2, 0, dtype=torch.int64)
    how = {"keep": 3, "length": 9, "coverage": coverage, **spread_over(coverage, 1, 0, generator)}
    pruned = prune_by_score(torch.zeros(2, 0), **rows, visual_index=none, attention_mask=mask, **how)
    assert [[row for row in index if row >= 0] for index in pruned.index.tolist()] == expected
    if mask is not None:
        mask = torch.cat([torch.ones(2, 3, dtype=torch.bool), mask], 1)
    in_one = prune_tokens(**inputs | {"visual_index": none}, **rows, attention_mask=mask, **how)
    assert torch.equal(in_one.index, pruned.index)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_prompt_that_ends_in_visual_tokens(keep: int) -> None:
    # In sample 0 the last row is the best visual token, in sample 1 the worst: one survivor more there.
    check([[0.1, 0.2, 0.9], [0.9, 0.2, 0.1]], [[2, 3, 4], [2, 3, 4]], keep, 5)


def test_all_rows_visual() -> None:
    check([[0.1, 0.3, 0.2]], [[0, 1, 2]], 1, 3)


def test_padding_is_dropped() -> None:
    left = [[False, False, True, True, True, True], [True] * 6]
    check([[0.3, 0.1], [0.2, 0.4]], [[3, 4], [1, 2]], 1, 6, mask=left)
    right = [[True, True, True, True, False, False], [True] * 6]
    pruned = check([[0.3, 0.1], [0.2, 0.4]], [[1, 2], [1, 2]], 1, 6, mask=right)
    assert pruned.index[0, -1] == 5  # the last row stays even as padding


def test_a_visual_token_on_padding_is_no_candidate() -> None:
    check([[0.9, 0.1, 0.2]], [[0, 2, 3]], 1, 5, mask=[[False, True, True, True, True]])


def test_ties_go_to_the_lower_position() -> None:
    pruned = check([[0.5, 0.5, 0.5, 0.5]], [[4, 1, 3, 2]], 2, 6)
    assert pruned.index[0, -4:].tolist() == [0, 1, 2, 5]
    check([[0.0, -0.0, 0.0]], [[3, 1, 2]], 1, 5)


def test_nan_scores_come_last_but_before_filler() -> None:
    check([[NAN, -math.inf, NAN, 7.0, 0.1]], [[1, 2, 3, -1, -1]], 1, 6)
    check([[NAN, -math.inf, NAN, 7.0, 0.1]], [[-1, 2, 3, -1, 1]], 2, 6)
    check([[NAN, 9.0, NAN]], [[3, -1, 1]], 1, 5)


def test_expanded_inputs() -> None:
    rows = rows_of(1, 6, axes=3)
    rows = {
        name: value.expand(*value.shape[:-2], 2, -1) if name == "position_ids" else value.expand(2, -1, -1)
        for name, value in rows.items()
    }
    assert rows["cos"].stride(0) == 0
    scores, visual = [[0.1, 0.4, 0.3], [0.5, 0.1, 0.2]], [[1, 2, 3], [1, 2, 3]]
    pruned = prune_by_score(torch.tensor(scores), **rows, visual_index=torch.tensor(visual), keep=1)
    check_rows(pruned, rows, oracle(scores, visual, [1, 1], 6), 4)


def test_filler_is_finite_and_only_on_the_left() -> None:
    rows = rows_of(2, 5)
    scores = torch.tensor([[0.3, 0.2], [0.1, 0.1]])
    pruned = prune_by_score(scores, **rows, visual_index=torch.tensor([[1, 2], [-1, -1]]), keep=0, length=7)
    assert (pruned.index >= 0).tolist() == [[False] * 4 + [True] * 3, [False] * 2 + [True] * 5]
    for output in pruned[:3]:
        assert output.isfinite().all()


def test_empty_batch() -> None:
    rows = {name: value[:0] for name, value in rows_of(1, 5).items()}
    empty = torch.empty(0, 2)
    pruned = prune_by_score(empty, **rows, visual_index=empty.long(), keep=1)
    assert pruned.hidden_states.shape == (0, 0, 6)
    pruned = prune_by_score(empty, **rows, visual_index=empty.long(), keep=1, length=4)
    assert pruned.hidden_states.shape == (0, 4, 6)


def attention_inputs(past: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "query": torch.randn(2, 4, 9, 8, generator=generator),
        "key": torch.randn(2, 2, 9 + past, 8, generator=generator),
        "visual_index": torch.tensor([[2, 3, 4, 5], [1, 2, 3, -1]]),
    }


@pytest.mark.parametrize("past", [0, 3])
def test_prune_tokens_is_scoring_then_pruning(past: int) -> None:
    inputs, rows = attention_inputs(past), rows_of(2, 9, axes=3)
    mask = torch.ones(2, 9 + past, dtype=torch.bool)
    mask[1, : past + 1] = False
    options = {"rows": torch.tensor([[7, 8], [-1, 8]]), "attention_mask": mask, "scale": 0.2}
    keep = torch.tensor([2, 1])
    pruned = prune_tokens(**inputs, **rows, keep=keep, **options)
    scores = visual_importance(**inputs, **options)
    assert torch.equal(pruned.scores, scores)
    survivors = oracle(
        scores.tolist(), inputs["visual_index"].tolist(), keep.tolist(), 9, mask[:, past:].tolist()
    )
    assert len(survivors[0]) > len(survivors[1])
    check_rows(pruned, rows, survivors, len(survivors[0]))


def test_prune_tokens_in_float64_selects_by_float32_scores() -> None:
    inputs, rows = attention_inputs(), rows_of(2, 9, dtype=torch.float64)
    double = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    pruned = prune_tokens(**double, **rows, keep=2)
    assert pruned.scores.dtype == torch.float32
    assert pruned.hidden_states.dtype == torch.float64
    assert torch.equal(pruned.index, prune_tokens(**inputs, **rows, keep=2).index)


def test_gradient_flows_to_the_sources() -> None:
    rows = rows_of(2, 5, dtype=torch.float64)
    rows["hidden_states"].requires_grad_()
    scores = torch.tensor([[0.3, 0.2], [0.1, 0.1]])
    pruned = prune_by_score(scores, **rows, visual_index=torch.tensor([[1, 2], [3, -1]]), keep=1)
    weight = torch.arange(1.0, pruned.index.numel() + 1).reshape(*pruned.index.shape, 1)
    (pruned.hidden_states * weight).sum().backward()
    expected = torch.zeros(2, 5)
    for b, row in enumerate(pruned.index.tolist()):
        for j, i in enumerate(row):
            expected[b, max(i, 0)] += weight[b, j, 0]  # filler is a copy of row 0
    torch.testing.assert_close(
        rows["hidden_states"].grad, expected[..., None].expand(-1, -1, 6).double(), rtol=0, atol=0
    )


def spread_over(
    coverage: str, samples: int, num_visual: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """What a coverage needs for slots of ``visual_index``: regions of any shape, up to four slots in each."""
    if coverage == "stride":
        return {"order": torch.randint(-1, 6, (samples, num_visual), generator=generator) * 2**28}
    neighbours = torch.full((samples, num_visual, 3), -1, dtype=torch.int32)
    for sample in neighbours:
        for together in torch.randperm(num_visual, generator=generator).split(4):
            for slot in together.tolist():
                others = [other for other in together.tolist() if other != slot]
                sample[slot, : len(others)] = torch.tensor(others)
    return {"neighbours": neighbours}


@pytest.mark.parametrize("coverage", ["region", "stride"])
@settings(deadline=None, max_examples=12)
@given(st.data())
def test_coverages(coverage: str, data: st.DataObject) -> None:
    """Slots in any order with filler, padding, scores with ties and NaN; of their own for each sample or for all alike."""
    seeded = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    batch, num_rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    num_visual = data.draw(st.integers(0, num_rows))
    visual = torch.rand(batch, num_rows, generator=seeded).argsort(1)[:, :num_visual]
    visual[torch.rand(visual.shape, generator=seeded) < 0.15] = -1
    scores = torch.randint(-4, 5, visual.shape, generator=seeded) / 4
    scores[torch.rand(visual.shape, generator=seeded) < 0.1] = NAN
    mask = torch.rand(batch, num_rows, generator=seeded) < 0.8 if data.draw(st.booleans()) else None
    keep = data.draw(st.lists(st.integers(0, num_visual + 1), min_size=batch, max_size=batch))
    spread = spread_over(coverage, data.draw(st.sampled_from([1, batch])), num_visual, seeded)
    per_region = data.draw(st.sampled_from([None, 1, 2, 4, 9])) if coverage == "region" else None
    share = data.draw(st.sampled_from([None, 0.0, 0.25, 0.293578, 1])) if coverage == "stride" else None
    expected = oracle(
        scores.tolist(),
        visual.tolist(),
        keep,
        num_rows,
        None if mask is None else mask.tolist(),
        per_region=per_region,
        spread=share,
        **{name: value.expand(batch, *value.shape[1:]).tolist() for name, value in spread.items()},
    )
    rows = rows_of(batch, num_rows)
    for length in (None, num_rows):
        pruned = prune_by_score(
            scores, **rows, visual_index=visual, keep=torch.tensor(keep), attention_mask=mask, length=length,
            coverage=coverage, per_region=per_region, spread=share, **spread,
        )  # fmt: skip
        check_rows(pruned, rows, expected, max(map(len, expected)) if length is None else length)


@pytest.mark.parametrize("coverage", ["region", "stride"])
@pytest.mark.parametrize("length", [None, 11])
def test_prune_tokens_by_coverage_is_scoring_then_pruning(
    coverage: str, length: int | None, generator: torch.Generator
) -> None:
    inputs, rows = attention_inputs(3), rows_of(2, 9)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :5] = False
    spread: dict[str, Any] = {**spread_over(coverage, 2, 4, generator)}
    if coverage == "stride":
        spread["spread"] = 0.5
    options = {"attention_mask": mask, "rows": torch.tensor([[7, 8], [-1, 8]])}
    how = {"keep": 2, "length": length, "coverage": coverage, **spread}
    pruned = prune_tokens(**inputs, **rows, **options, **how)
    scores = visual_importance(**inputs, **options)
    expected = prune_by_score(
        scores, **rows, visual_index=inputs["visual_index"], attention_mask=mask[:, 3:], **how
    )
    for found, wanted in zip(pruned, expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_region_is_kept_where_the_best_would_not(generator: torch.Generator) -> None:
    """Slots 0, 1 and 2, 3 are regions; rows 0 and 6 are text."""
    neighbours = torch.tensor([[[1], [0], [3], [2]]], dtype=torch.int32)
    how = {"visual_index": torch.tensor([[2, 3, 4, 5]]), "keep": 2, "neighbours": neighbours}
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.2]])
    for per_region, visual in ((1, [2, 5]), (2, [2, 3]), (None, [2, 5])):
        pruned = prune_by_score(scores, **rows_of(1, 7), **how, coverage="region", per_region=per_region)
        assert pruned.index.tolist() == [[0, 1, *visual, 6]]


def test_the_uniform_sample_comes_first_and_the_best_fill_the_rest() -> None:
    """3 of 10 by order alone, among them the worst-scored of all."""
    scores = torch.arange(12.0)[None]
    order = torch.tensor([[0, 1, -1, 9, 9, 9, 9, 9, 2, 9, 9, 9]])
    pruned = prune_by_score(
        scores, **rows_of(1, 13), visual_index=torch.arange(12)[None], keep=10, coverage="stride", order=order
    )
    assert pruned.index.tolist() == [[0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


ROWS = rows_of(2, 5)
SCORES = torch.tensor([[0.3, 0.2], [0.1, 0.4]])
VISUAL = torch.tensor([[1, 2], [2, 3]])
NEIGHBOURS = torch.tensor([[[1], [0]]], dtype=torch.int32)
BY_REGION = {"coverage": "region", "neighbours": NEIGHBOURS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": ROWS["hidden_states"][0]}, r"hidden_states: expected 3 dimensions \[B, Q, C\]"),
        ({"hidden_states": ROWS["hidden_states"].int()}, "hidden_states: expected dtype .*, got .*int32"),
        ({"hidden_states": ROWS["hidden_states"][:, :0]}, "hidden_states: expected at least one row"),
        ({"cos": ROWS["cos"][:1]}, r"cos: expected \[B, Q, D'\] with B = 2, got shape \[1, 5, 4\]"),
        ({"sin": ROWS["sin"][..., :2]}, r"sin: expected \[B, Q, D'\] with D' = 4, got shape \[2, 5, 2\]"),
        ({"sin": ROWS["sin"].half()}, "sin: expected dtype torch.float32, got .*float16"),
        ({"position_ids": torch.zeros(1, 5).long()}, r"position_ids: expected \[B, Q\] with B = 2"),
        ({"position_ids": torch.zeros(3, 2, 4).long()}, r"position_ids: expected \[A, B, Q\] with Q = 5"),
        ({"position_ids": torch.zeros(2, 5).int()}, "position_ids: expected dtype torch.int64, got .*int32"),
        ({"visual_index": VISUAL[:, :1]}, r"scores: expected \[B, V\] with V = 1, got shape \[2, 2\]"),
        ({"visual_index": VISUAL + 2}, "visual_index: expected values in -1..4, got 5"),
        ({"visual_index": VISUAL - 3}, "visual_index: expected values in -1..4, got -2"),
        (
            {"visual_index": torch.tensor([[1, 2], [3, 3]])},
            "visual_index: expected distinct positions, got 3 twice in sample 1",
        ),
        ({"scores": SCORES.double()}, "scores: expected dtype torch.float32, got .*float64"),
        ({"keep": -1}, "keep: expected a count >= 0, got -1"),
        ({"keep": 0.25}, r"keep: expected an int or an int64 tensor \[B\], got 0.25 \(float\)"),
        ({"keep": torch.tensor([1])}, r"keep: expected \[B\] with B = 2, got shape \[1\]"),
        ({"keep": torch.tensor([1, -3])}, "keep: expected counts >= 0, got -3"),
        ({"attention_mask": torch.ones(2, 6).bool()}, r"attention_mask: expected \[B, Q\] with Q = 5"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask: expected dtype torch.bool"),
        ({"length": 3}, "length: expected at least 4, the most rows that stay in a sample, got 3"),
        ({"length": 0}, "length: expected at least 1, got 0"),
        ({"spread": 0.5}, "spread: expected None with coverage='topk', got 0.5"),
        (
            {"coverage": "stride", "order": VISUAL, "spread": 1.5},
            r"spread: expected a float in 0..1 with at most 9 decimals, got 1.5 \(float\)",
        ),
        (
            {"coverage": "stride", "order": VISUAL, "spread": 0.1234567891},
            "spread: expected a float in 0..1 with at most 9 decimals",
        ),
        ({"coverage": "random"}, "coverage: expected one of 'topk', 'region', 'stride', got 'random'"),
        ({"coverage": "region"}, r"neighbours: expected \[B or 1, V, M\].* with coverage='region', got None"),
        ({"coverage": "stride"}, r"order: expected \[B or 1, V\].* with coverage='stride', got None"),
        ({"neighbours": NEIGHBOURS}, "neighbours: expected None with coverage='topk', got shape"),
        ({"order": VISUAL, **BY_REGION}, "order: expected None with coverage='region', got shape"),
        (
            {"coverage": "stride", "order": VISUAL, "per_region": 1},
            "per_region: expected None .*'stride', got 1",
        ),
        ({**BY_REGION, "per_region": 0}, "per_region: expected at least 1, got 0"),
        ({**BY_REGION, "per_region": 1.0}, r"per_region: expected an int or None, got 1.0 \(float\)"),
        ({**BY_REGION, "neighbours": NEIGHBOURS[:, :1]}, r"neighbours: expected \[B\|1, V, M\] with V = 2"),
        (
            {**BY_REGION, "neighbours": NEIGHBOURS.long()},
            "neighbours: expected dtype torch.int32, got .*int64",
        ),
        (
            {**BY_REGION, "neighbours": NEIGHBOURS.expand(3, 2, 1)},
            r"neighbours: expected \[B, V, M\] with B = 2, or",
        ),
        ({**BY_REGION, "neighbours": NEIGHBOURS + 1}, "neighbours: expected values in -1..1, got 2"),
        (
            {**BY_REGION, "neighbours": 1 - NEIGHBOURS},
            "neighbours: expected the others .* entry 0 beside itself",
        ),
        ({"coverage": "stride", "order": VISUAL.int()}, "order: expected dtype torch.int64, got .*int32"),
        ({"coverage": "stride", "order": VISUAL[:, :1]}, r"order: expected \[B\|1, V\] with V = 2"),
        ({"coverage": "stride", "order": VISUAL[[0, 1, 1]]}, r"order: expected \[B, V\] with B = 2, or"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"scores": SCORES, **ROWS, "visual_index": VISUAL, "keep": 1, **change}
    with pytest.raises(ValueError, match=message):
        prune_by_score(**arguments)


def test_prune_tokens_checks_its_rows_against_the_query() -> None:
    with pytest.raises(
        ValueError, match=r"hidden_states: expected \[B, Q, C\] with Q = 9, got shape \[2, 8, 6\]"
    ):
        prune_tokens(**attention_inputs(), **rows_of(2, 8), keep=1)
