"""The operators as torch.library objects: opcheck, compile, dynamic shapes, export, fake CUDA tensors."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import gap_kernels
import pytest
import torch
from gap_kernels import prune_by_score, prune_tokens, topk_indices, visual_importance
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

OPS = torch.ops.gap_kernels


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(batch: int = 2, num_rows: int = 9, past: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of prune_tokens, with an expanded cos and 3-D ids."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "query": torch.randn(batch, 4, num_rows, 8, generator=generator),
        "key": torch.randn(batch, 2, num_rows + past, 8, generator=generator),
        "hidden_states": torch.randn(batch, num_rows, 6, generator=generator),
        "cos": torch.randn(1, num_rows, 4, generator=generator).expand(batch, -1, -1),
        "sin": torch.randn(batch, num_rows, 4, generator=generator),
        "position_ids": torch.arange(num_rows).expand(3, batch, num_rows),
        "visual_index": torch.tensor([[1, 2, 3, 4, 5]] * (batch - 1) + [[2, -1, 3, -1, -1]]),
    }
    return tensors


ROW_NAMES = ("hidden_states", "cos", "sin", "position_ids")


def eager_and(function, **compile_options):
    """The function and its compiled form, without graph breaks."""
    return function, torch.compile(function, fullgraph=True, backend="aot_eager", **compile_options)


def assert_same(left, right) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("counts", [None, torch.tensor([0, 3])])
def test_opcheck_topk_indices(counts: Tensor | None) -> None:
    opcheck(OPS.topk_indices.default, (torch.randn(2, 7), 3, counts, 4))


@pytest.mark.parametrize("full", [False, True])
def test_opcheck_visual_importance(full: bool) -> None:
    x = inputs(past=2)
    mask = torch.ones(2, 11, dtype=torch.bool)
    optional = (torch.tensor([[7, 8], [-1, 8]]), mask, torch.zeros(2, 4, 2), 0.3) if full else (None,) * 4
    variants = {"causal": False, "value": torch.randn(2, 2, 11, 6), "head_reduction": "max"} if full else {}
    opcheck(OPS.visual_importance.default, (x["query"], x["key"], x["visual_index"], *optional), variants)


@pytest.mark.parametrize("counts", [None, torch.tensor([0, 3])])
@pytest.mark.parametrize("mask", [None, torch.ones(2, 9, dtype=torch.bool)])
def test_opcheck_surviving_rows(counts: Tensor | None, mask: Tensor | None) -> None:
    opcheck(OPS.surviving_rows.default, (torch.randn(2, 5), inputs()["visual_index"], 2, counts, mask, 9, 11))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_gather_rows(needs_grad: bool) -> None:
    x = inputs()
    x["hidden_states"].requires_grad_(needs_grad)
    index = torch.tensor([[-1, 0, 3, 8], [1, 2, 4, 7]])
    opcheck(OPS.gather_rows.default, (*(x[name] for name in ROW_NAMES), index))
    opcheck(OPS.gather_rows.default, (*(x[name] for name in ROW_NAMES[:3]), x["position_ids"][0], index))


@pytest.mark.parametrize("full", [False, True])
def test_opcheck_prune_tokens(full: bool) -> None:
    x = inputs(past=2)
    optional = (None,) * 4
    if full:
        mask = torch.ones(2, 11, dtype=torch.bool)
        optional = (torch.tensor([[7, 8], [-1, 8]]), mask, torch.zeros(2, 4, 2), 0.3)
    counts = torch.tensor([1, 2]) if full else None
    opcheck(OPS.prune_tokens.default, (*x.values(), 2, counts, *optional, 9))


BY_REGION = ("region", torch.tensor([[[1], [0], [3], [2], [-1]]], dtype=torch.int32), 0)
BY_STRIDE = ("stride", None, 0, torch.arange(5)[None])


@pytest.mark.parametrize("spread", [BY_REGION, BY_STRIDE], ids=["region", "stride"])
def test_opcheck_coverages(spread: tuple[object, ...]) -> None:
    x = inputs()
    opcheck(OPS.prune_tokens.default, (*x.values(), 2, None, None, None, None, None, 9, *spread))
    opcheck(OPS.surviving_rows.default, (torch.randn(2, 5), x["visual_index"], 2, None, None, 9, 11, *spread))


@pytest.mark.parametrize("spread", [BY_REGION, BY_STRIDE], ids=["region", "stride"])
def test_compile_coverages(spread: tuple[object, ...]) -> None:
    coverage, neighbours, _, order = (*spread, None)[:4]
    eager, compiled = eager_and(
        lambda x, n, o: prune_tokens(**x, keep=2, length=9, coverage=coverage, neighbours=n, order=o)
    )
    assert_same(compiled(inputs(), neighbours, order), eager(inputs(), neighbours, order))


def test_compile_topk_indices() -> None:
    scores = torch.randn(2, 7)
    eager, compiled = eager_and(lambda s: topk_indices(s, 3))
    assert torch.equal(compiled(scores), eager(scores))
    eager, compiled = eager_and(lambda s, k: topk_indices(s, k, length=5))
    counts = torch.tensor([2, 5])
    assert torch.equal(compiled(scores, counts), eager(scores, counts))


def test_compile_visual_importance() -> None:
    x = inputs(past=2)
    eager, compiled = eager_and(
        lambda q, k, v, r: visual_importance(q, k, v, rows=r, attention_mask=torch.ones(2, 11).bool())
    )
    arguments = (x["query"], x["key"], x["visual_index"], torch.tensor([[8, -1], [7, 8]]))
    assert torch.equal(compiled(*arguments), eager(*arguments))
    eager, compiled = eager_and(
        lambda q, k, v, w: visual_importance(q, k, v, causal=False, value=w, head_reduction="max"),
        dynamic=True,
    )
    for num_rows, value_dim in ((9, 6), (10, 12)):
        x = inputs(num_rows=num_rows, past=2)
        value = torch.randn(2, 2, num_rows + 2, value_dim)
        arguments = (x["query"], x["key"], x["visual_index"], value)
        assert torch.equal(compiled(*arguments), eager(*arguments))


@pytest.mark.parametrize("keep", [2, torch.tensor([2, 1])])
def test_compile_prune(keep: int | Tensor) -> None:
    x = inputs()
    eager, compiled = eager_and(lambda x, k: prune_tokens(**x, keep=k, length=9))
    assert_same(compiled(x, keep), eager(x, keep))
    rows = {name: x[name] for name in (*ROW_NAMES, "visual_index")}
    eager, compiled = eager_and(lambda s, x, k: prune_by_score(s, **x, keep=k, length=9))
    scores = torch.rand(2, 5)
    assert_same(compiled(scores, rows, keep), eager(scores, rows, keep))


def test_compile_with_dynamic_shapes() -> None:
    eager, compiled = eager_and(lambda x, k, n: prune_tokens(**x, keep=k, length=n), dynamic=True)
    for batch, num_rows, keep in ((2, 9, 2), (3, 11, 3), (4, 8, 1)):
        x = inputs(batch, num_rows)
        assert_same(compiled(x, keep, num_rows), eager(x, keep, num_rows))
    eager, compiled = eager_and(lambda s, k: topk_indices(s, k), dynamic=True)
    for batch, n, k in ((2, 9, 2), (3, 11, 5)):
        scores = torch.randn(batch, n)
        assert torch.equal(compiled(scores, k), eager(scores, k))


def test_value_checks_still_run_when_compiled() -> None:
    _, compiled = eager_and(lambda x, n: prune_tokens(**x, keep=2, length=n))
    with pytest.raises(ValueError, match="length: expected at least 9"):
        compiled(inputs(), 5)


def test_compile_without_length_says_what_to_pass() -> None:
    _, compiled = eager_and(lambda x: prune_tokens(**x, keep=2))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pass length=\.\.\. when compiling"):
        compiled(inputs())
    _, compiled = eager_and(lambda s, k: topk_indices(s, k))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pass length=\.\.\. when compiling"):
        compiled(torch.randn(2, 7), torch.tensor([1, 2]))


def test_compile_without_length_works_with_graph_breaks() -> None:
    x = inputs()
    compiled = torch.compile(lambda x: prune_tokens(**x, keep=2), backend="aot_eager")
    assert_same(compiled(x), prune_tokens(**x, keep=2))


class Scorer(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, visual_index: Tensor) -> Tensor:
        return visual_importance(query, key, visual_index, causal=False, value=value, head_reduction="max")


def test_export_of_importance_variants() -> None:
    num_rows = torch.export.Dim("num_rows", min=8)
    shapes = {"query": {2: num_rows}, "key": {2: num_rows}, "value": {2: num_rows}, "visual_index": {}}
    x = inputs()
    example = (x["query"], x["key"], torch.randn(2, 2, 9, 6), x["visual_index"])
    program = torch.export.export(Scorer(), example, dynamic_shapes=shapes)
    x = inputs(num_rows=12, seed=5)
    arguments = (x["query"], x["key"], torch.randn(2, 2, 12, 6), x["visual_index"])
    assert torch.equal(program.module()(*arguments), Scorer()(*arguments))


class Pruner(torch.nn.Module):
    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(prune_tokens(**x, keep=2, length=x["query"].shape[2]))


def test_export_with_dynamic_shapes() -> None:
    batch, num_rows = torch.export.Dim("batch", min=2), torch.export.Dim("num_rows", min=8)
    shapes = {
        "query": {0: batch, 2: num_rows},
        "key": {0: batch, 2: num_rows},
        "hidden_states": {0: batch, 1: num_rows},
        "cos": {0: batch, 1: num_rows},
        "sin": {0: batch, 1: num_rows},
        "position_ids": {1: batch, 2: num_rows},
        "visual_index": {0: batch},
    }
    program = torch.export.export(Pruner(), (inputs(),), dynamic_shapes=(shapes,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "gap_kernels.prune_tokens.default" in called
    x = inputs(3, 12, seed=5)
    assert_same(program.module()(x), Pruner()(x))


def test_fake_cuda_tensors() -> None:
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in inputs().items()}
    with FakeTensorMode():
        x = {name: torch.empty(size, dtype=dtype, device="cuda") for name, (size, dtype) in shapes.items()}
        pruned = prune_tokens(**x, keep=2, length=7)
        index = topk_indices(torch.empty(2, 9, device="cuda"), 3)
    assert [output.device.type for output in (*pruned, index)] == ["cuda"] * 7
    assert pruned.hidden_states.shape == (2, 7, 6)
    assert pruned.cos.shape == pruned.sin.shape == (2, 7, 4)
    assert pruned.position_ids.shape == (3, 2, 7)
    assert pruned.index.shape == (2, 7)
    assert pruned.scores.shape == (2, 5)
    assert index.shape == (2, 3)


def test_public_names() -> None:
    assert set(gap_kernels.__all__) <= set(dir(gap_kernels))


def test_no_public_name_hides_a_module() -> None:
    for module in pkgutil.iter_modules(gap_kernels.__path__):
        loaded = importlib.import_module(f"gap_kernels.{module.name}")
        assert getattr(gap_kernels, module.name) is loaded


SCHEMAS = (
    (
        "attention(Tensor query, Tensor key, Tensor value, bool causal, Tensor? attention_mask,"
        " float? scale, Tensor? importance_rows, Tensor? importance_columns) -> (Tensor, Tensor, Tensor)"
    ),
    (
        "attention_received(Tensor query, Tensor key, Tensor? attention_mask, Tensor? cu_seqlens,"
        " bool causal, float? scale, Tensor? lse) -> Tensor"
    ),
    "collect_nearest(Tensor features, Tensor keys, Tensor weights, Tensor kept, SymInt count) -> Tensor",
    (
        "corrected_importance(Tensor query, Tensor key, Tensor visual_index, Tensor cos, Tensor sin,"
        " Tensor turns, SymInt heads, Tensor? rows, Tensor? attention_mask, float? scale) -> Tensor"
    ),
    (
        "distinct_indices(Tensor features, Tensor scores, SymInt k, SymInt important, SymInt removed_at_once)"
        " -> Tensor"
    ),
    (
        "gather_rows(Tensor hidden_states, Tensor cos, Tensor sin, Tensor position_ids, Tensor index)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    (
        "greedy_indices(Tensor features, Tensor? scores, Tensor? mask, str rule, float exponent, SymInt k,"
        " Tensor? counts, SymInt length) -> Tensor"
    ),
    (
        "least_similar_indices(Tensor features, Tensor pivots, Tensor? mask, SymInt k, Tensor? counts,"
        " SymInt length) -> Tensor"
    ),
    "merge_nearest(Tensor features, Tensor keys, Tensor targets, Tensor? excluded, bool average) -> Tensor",
    (
        "prune_tokens(Tensor query, Tensor key, Tensor hidden_states, Tensor cos, Tensor sin,"
        " Tensor position_ids, Tensor visual_index, SymInt keep, Tensor? counts, Tensor? rows,"
        " Tensor? attention_mask, Tensor? lse, float? scale, SymInt length"
        ', str coverage="topk", Tensor? neighbours=None, SymInt per_region=0, Tensor? order=None,'
        " SymInt share=3, SymInt of_shares=10) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    (
        "read_prompt(Tensor tokens, SymInt[] placeholders, Tensor? attention_mask, Tensor? answer,"
        " Tensor? rankers, Tensor? index, SymInt num_visual, SymInt num_text, SymInt[]? expected)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    ("scatter_rows(Tensor values, Tensor index, SymInt num_rows, Tensor? among, Tensor? base) -> Tensor"),
    (
        "spatial_aggregate(Tensor features, Tensor similarity_features, Tensor anchors, SymInt width,"
        " float radius, Tensor? pillars, float? self_weight, Tensor? scores=None, SymInt share=0,"
        " SymInt of_shares=1) -> Tensor"
    ),
    (
        "surviving_rows(Tensor scores, Tensor visual_index, SymInt keep, Tensor? counts,"
        ' Tensor? attention_mask, SymInt num_rows, SymInt length, str coverage="topk",'
        " Tensor? neighbours=None, SymInt per_region=0, Tensor? order=None, SymInt share=3,"
        " SymInt of_shares=10) -> Tensor"
    ),
    "text_cosine(Tensor embeds, Tensor visual_index, Tensor text_rows) -> Tensor",
    "text_raters(Tensor embeds, Tensor visual_index, Tensor text_rows) -> Tensor",
    "topk_indices(Tensor scores, SymInt k, Tensor? counts, SymInt length) -> Tensor",
    (
        "topk_per_region(Tensor scores, Tensor neighbours, SymInt per_region, SymInt k, Tensor? counts,"
        " SymInt length) -> Tensor"
    ),
    (
        "unrotate(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor pairs, bool rescale)"
        " -> (Tensor, Tensor)"
    ),
    (
        "visual_importance(Tensor query, Tensor key, Tensor visual_index, Tensor? rows,"
        " Tensor? attention_mask, Tensor? lse, float? scale, bool causal=True, Tensor? value=None,"
        ' str head_reduction="mean") -> Tensor'
    ),
    (
        "window_ranks(Tensor scores, Tensor earlier, SymInt height, SymInt width, SymInt count,"
        " SymInt windows) -> Tensor"
    ),
)
"""What a program that was compiled or exported with an earlier release holds this one to."""


def test_schemas_stay_as_they_are() -> None:
    every = (str(schema) for schema in torch._C._jit_get_all_schemas())
    assert sorted(schema for schema in every if schema.startswith("gap_kernels::")) == [
        f"gap_kernels::{schema}" for schema in SCHEMAS
    ]
