"""Region-wise top-k against a Python loop; as a torch.library object; its errors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gap_kernels import grid_neighbours, topk_indices, topk_per_region
from hypothesis import given, settings
from hypothesis import strategies as st
from support.naive.region import oracle, regions
from support.naive.select import fill
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

NAN, INF = math.nan, math.inf


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Exact in float32: the oracle would tell floats apart that are equal there.
SMALLEST, LARGEST = 2.0**-149, (2 - 2**-23) * 2.0**127
SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, INF, -INF, NAN, SMALLEST, LARGEST]),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
)
REGION = st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1), (2, 3), (3, 3), (1, 9)])


@settings(deadline=None)
@given(st.data())
def test_grids(data: st.DataObject) -> None:
    """Even, odd, a single row or column; a count for all samples, and one for each."""
    grid, region = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))), data.draw(REGION)
    n, batch = grid[0] * grid[1], data.draw(st.integers(1, 3))
    scores = data.draw(st.lists(st.lists(SCORE, min_size=n, max_size=n), min_size=batch, max_size=batch))
    neighbours = grid_neighbours(grid, region)[None]
    per_region = data.draw(st.none() | st.integers(1, region[0] * region[1] + 1))
    tensor = torch.tensor(scores, dtype=torch.float32)

    k = data.draw(st.integers(0, n + 2))
    index = topk_per_region(tensor, neighbours, per_region, k)
    assert index.tolist() == [oracle(row, neighbours[0].tolist(), per_region, k) for row in scores]

    counts = data.draw(st.lists(st.integers(0, n + 2), min_size=batch, max_size=batch))
    expected = [
        oracle(row, neighbours[0].tolist(), per_region, count)
        for row, count in zip(scores, counts, strict=True)
    ]
    length = min(max(counts), n)
    ragged = topk_per_region(tensor, neighbours, per_region, torch.tensor(counts))
    assert ragged.tolist() == [fill(row, length) for row in expected]
    length += data.draw(st.integers(0, 3))
    ragged = topk_per_region(tensor, neighbours, per_region, torch.tensor(counts), length=length)
    assert ragged.tolist() == [fill(row, length) for row in expected]


@settings(deadline=None)
@given(st.data())
def test_any_neighbours(data: st.DataObject) -> None:
    """Of their own for each sample, in any order, -1 anywhere, and not mutual."""
    n, batch, most = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 8))
    drawn = [
        data.draw(st.permutations([other for other in range(n) if other != entry] + [-1] * most))[:most]
        for _ in range(batch)
        for entry in range(n)
    ]
    neighbours = torch.tensor(drawn, dtype=torch.int32).reshape(batch, n, most)
    scores = data.draw(st.lists(st.lists(SCORE, min_size=n, max_size=n), min_size=batch, max_size=batch))
    per_region, k = data.draw(st.integers(1, 4)), data.draw(st.integers(0, n))
    index = topk_per_region(torch.tensor(scores, dtype=torch.float32), neighbours, per_region, k)
    assert index.tolist() == [
        oracle(row, around, per_region, k) for row, around in zip(scores, neighbours.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("scores", "per_region", "k", "expected"),
    [
        # Regions (0, 1, 4, 5) and (2, 3, 6, 7) of a 2 x 4 grid.
        ([9, 8, 1, 2, 7, 6, 3, 4], 1, 2, [0, 7]),
        ([9, 8, 1, 2, 7, 6, 3, 4], 2, 2, [0, 1]),  # both candidates of one region are better
        ([9, 8, 1, 2, 7, 6, 3, 4], 2, 4, [0, 1, 6, 7]),
        ([9, 8, 1, 2, 7, 6, 3, 4], 1, 4, [0, 1, 4, 7]),  # two candidates, and the best of the others
        ([9, 8, 1, 2, 7, 6, 3, 4], 4, 3, [0, 1, 4]),
        ([5, 5, 5, 5, 5, 5, 5, 5], 1, 2, [0, 2]),
        ([5, 5, 5, 5, 5, 5, 5, 5], 1, 3, [0, 1, 2]),
        ([-0.0, 0.0, 0.0, -0.0, 1, 0, 0, 0], 2, 4, [0, 2, 3, 4]),
        ([NAN, -INF, NAN, NAN, NAN, NAN, NAN, NAN], 1, 2, [1, 2]),
        ([NAN, -INF, NAN, NAN, NAN, NAN, NAN, NAN], 1, 3, [0, 1, 2]),
        ([1, 1, INF, INF, -INF, -INF, INF, INF], 2, 3, [0, 2, 3]),
        ([9, 8, 1, 2, 7, 6, 3, 4], 1, 0, []),
        ([9, 8, 1, 2, 7, 6, 3, 4], 1, 10**30, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_order_and_ties(scores: list[float], per_region: int, k: int, expected: list[int]) -> None:
    tensor = torch.tensor([scores], dtype=torch.float32)
    assert topk_per_region(tensor, grid_neighbours((2, 4))[None], per_region, k).tolist() == [expected]


def test_smaller_regions_at_the_edges() -> None:
    """Cell 8 of 3 x 3 is a region of its own, so a candidate with any score."""
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2, -INF]])
    assert topk_per_region(scores, grid_neighbours((3, 3))[None], 1, 4).tolist() == [[0, 2, 6, 8]]


def test_without_neighbours_it_is_the_plain_selection() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    none = torch.full((1, 50, 3), -1, dtype=torch.int32)
    for neighbours in (none, none[..., :0], none[..., :1].expand(3, -1, -1)):
        assert torch.equal(topk_per_region(scores, neighbours, 1, 20), topk_indices(scores, 20))
    every = grid_neighbours((5, 10))[None]
    assert torch.equal(topk_per_region(scores, every, 4, 20), topk_indices(scores, 20))
    assert not torch.equal(topk_per_region(scores, every, 3, 20), topk_indices(scores, 20))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    scores = torch.zeros(shape)
    counts = torch.zeros(shape[0], dtype=torch.int64)
    for groups in {1, shape[0]}:
        neighbours = torch.full((groups, shape[1], 3), -1, dtype=torch.int32)
        index = topk_per_region(scores, neighbours, 1, 4)
        assert index.shape == (shape[0], min(4, shape[1]))
        assert index.dtype == torch.int64
        assert topk_per_region(scores, neighbours, 1, counts).shape == (shape[0], 0)
        assert topk_per_region(scores, neighbours, 1, counts, length=3).tolist() == [[-1, -1, -1]] * shape[0]


def test_strided_inputs() -> None:
    scores = torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).T
    neighbours = grid_neighbours((4, 4)).T.contiguous().T[None]
    counts = torch.tensor([[3, 7], [5, 7], [2, 7]])[:, 0]
    expected = topk_per_region(scores.contiguous(), neighbours.contiguous(), 1, counts.contiguous())
    assert torch.equal(topk_per_region(scores, neighbours, 1, counts), expected)
    assert torch.equal(topk_per_region(scores, neighbours.expand(3, -1, -1), 1, counts), expected)
    behind_cls = torch.cat([torch.full((3, 1), INF), scores], 1)[:, 1:]
    assert torch.equal(topk_per_region(behind_cls, neighbours, 1, counts), expected)
    one = topk_per_region(scores[:1].expand(3, -1), neighbours, 1, counts)
    assert torch.equal(one[0], expected[0])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), REGION)
def test_neighbours_of_a_grid(height: int, width: int, region: tuple[int, int]) -> None:
    neighbours = grid_neighbours((height, width), region)
    assert neighbours.shape == (height * width, region[0] * region[1] - 1)
    assert neighbours.dtype == torch.int32
    for cells in regions((height, width), region):
        for cell in cells:
            found = [other for other in neighbours[cell].tolist() if other != -1]
            assert found == [other for other in cells if other != cell]


def test_neighbours_are_kept() -> None:
    kept = grid_neighbours((4, 6))
    assert grid_neighbours((4, 6), (2, 2), "cpu") is kept
    assert grid_neighbours((6, 4)) is not kept
    assert grid_neighbours((4, 6), (1, 4)) is not kept
    with torch.device("meta"):
        assert grid_neighbours((4, 6)).device.type == "meta"
    assert grid_neighbours((4, 6)) is kept
    with FakeTensorMode():
        assert type(grid_neighbours((4, 6))) is not Tensor
        assert type(grid_neighbours((4, 8))) is not Tensor
        assert grid_neighbours((4, 6), device="cuda").device.type == "cuda"
    assert type(grid_neighbours((4, 8))) is Tensor
    with torch.inference_mode():
        assert not grid_neighbours((4, 10)).is_inference()


def arguments(
    batch: int = 2, grid: tuple[int, int] = (3, 5), shared: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor]:
    scores = torch.randn(batch, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    return scores, grid_neighbours(grid)[None].expand(1 if shared else batch, -1, -1)


@pytest.mark.parametrize("counts", [None, torch.tensor([0, 7])])
@pytest.mark.parametrize("shared", [True, False])
def test_opcheck(counts: Tensor | None, shared: bool) -> None:
    op = torch.ops.gap_kernels.topk_per_region.default
    opcheck(op, (*arguments(shared=shared), 1, 5, counts, 8))


def by_grid(scores: Tensor, height: int, k: int) -> Tensor:
    neighbours = grid_neighbours((height, scores.shape[1] // height), device=scores.device)
    return topk_per_region(scores, neighbours[None], 1, k)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile() -> None:
    compiled = torch.compile(by_grid, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, grid, k in ((2, (3, 5), 4), (3, (4, 6), 7), (4, (2, 7), 99)):
        scores, _ = arguments(batch, grid)
        assert torch.equal(compiled(scores, grid[0], k), by_grid(scores, grid[0], k))

    def ragged(scores: Tensor, neighbours: Tensor, counts: Tensor, length: int | None) -> Tensor:
        return topk_per_region(scores, neighbours, 2, counts, length=length)

    compiled = torch.compile(ragged, fullgraph=True, backend="aot_eager")
    given, counts = arguments(shared=False), torch.tensor([2, 20])
    assert torch.equal(compiled(*given, counts, 15), ragged(*given, counts, 15))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pass length=\.\.\. when compiling"):
        compiled(*given, counts, None)


class Selector(torch.nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return by_grid(scores, 3, 6)


@pytest.mark.usefixtures("_fresh_compiler")
def test_export() -> None:
    batch, width = torch.export.Dim("batch", min=2), torch.export.Dim("width", min=3)
    program = torch.export.export(
        Selector(), (arguments()[0],), dynamic_shapes={"scores": {0: batch, 1: 3 * width}}
    )
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "gap_kernels.topk_per_region.default" in called
    scores, _ = arguments(3, (3, 7), seed=5)
    assert torch.equal(program.module()(scores), Selector()(scores))


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        scores = torch.empty(2, 20, device="cuda")
        neighbours = grid_neighbours((4, 5), device="cuda").unsqueeze(0)
        index = topk_per_region(scores, neighbours, 1, 6)
    assert (index.device.type, index.shape, index.dtype) == ("cuda", (2, 6), torch.int64)


SCORES, NEIGHBOURS = torch.zeros(2, 6), grid_neighbours((2, 3))[None]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((SCORES.half(), NEIGHBOURS, 1, 2), {}, "scores: expected dtype torch.float32, got .*float16"),
        ((SCORES[0], NEIGHBOURS, 1, 2), {}, r"scores: expected 2 dimensions \[B, N\], got shape \[6\]"),
        ((SCORES, NEIGHBOURS.long(), 1, 2), {}, "neighbours: expected dtype torch.int32, got .*int64"),
        ((SCORES, NEIGHBOURS[0], 1, 2), {}, r"neighbours: expected 3 dimensions \[B\|1, N, R\], got shape \[6, 3\]"),
        ((SCORES, NEIGHBOURS[:, 1:], 1, 2), {}, r"neighbours: expected \[B\|1, N, R\] with N = 6, got shape \[1, 5, 3\]"),
        (
            (SCORES, NEIGHBOURS.expand(3, -1, -1), 1, 2),
            {},
            r"neighbours: expected \[B, N, R\] with B = 2, or \[1, N, R\], got shape \[3, 6, 3\]",
        ),
        ((SCORES, NEIGHBOURS.repeat(1, 1, 3), 1, 2), {}, r"neighbours: expected R = 0..8 of an entry, got 9"),
        ((SCORES, NEIGHBOURS + 2, 1, 2), {}, "neighbours: expected values in -1..5, got 6"),
        ((SCORES, NEIGHBOURS - 1, 1, 2), {}, "neighbours: expected values in -1..5, got -2"),
        (
            (SCORES, torch.arange(6, dtype=torch.int32)[None, :, None], 1, 2),
            {},
            "neighbours: expected the others of a region, got entry 0 beside itself",
        ),
        (
            (SCORES, NEIGHBOURS[..., [0, 1, 0]], 1, 2),
            {},
            "neighbours: expected distinct entries, got one twice beside entry 0",
        ),
        ((SCORES, NEIGHBOURS, 1, 10**20 - 10**40), {}, "k: expected a count >= 0, got an int of 133 bits"),
        ((SCORES, NEIGHBOURS, 1, 2), {"length": 10**6000}, "length: expected at most 16777216, got an int of"),
        ((SCORES.to_sparse(), NEIGHBOURS, 1, 2), {}, r"scores: expected a dense tensor \[B, N\], got .* layout"),
        ((SCORES, NEIGHBOURS.to("meta"), 1, 2), {}, "neighbours: expected device cpu, got .*meta"),
        ((SCORES, NEIGHBOURS, 0, 2), {}, "per_region: expected at least 1, got 0"),
        ((SCORES, NEIGHBOURS, 1.0, 2), {}, r"per_region: expected an int or None, got 1.0 \(float\)"),
        ((SCORES, NEIGHBOURS, True, 2), {}, r"per_region: expected an int or None, got True \(bool\)"),
        ((SCORES, NEIGHBOURS, 1, -1), {}, "k: expected a count >= 0, got -1"),
        ((SCORES, NEIGHBOURS, 1, 0.5), {}, r"k: expected an int or an int64 tensor \[B\], got 0.5 \(float\)"),
        ((SCORES, NEIGHBOURS, 1, torch.tensor([1])), {}, r"k: expected \[B\] with B = 2, got shape \[1\]"),
        ((SCORES, NEIGHBOURS, 1, torch.tensor([1, -2])), {}, "k: expected counts >= 0, got -2"),
        ((SCORES, NEIGHBOURS, 1, 2), {"length": 1}, "length: expected at least 2, got 1"),
        ((SCORES, NEIGHBOURS, 1, 9), {"length": 5}, "length: expected at least 6, got 5"),
        (
            (SCORES, NEIGHBOURS, 1, torch.tensor([1, 9])),
            {"length": 5},
            r"length: expected at least the largest min\(k, N\), 6, got 5",
        ),
        ((SCORES, NEIGHBOURS, 1, 2), {"length": 2.0}, r"length: expected an int or None, got 2.0 \(float\)"),
    ],
)  # fmt: skip
def test_bad_arguments(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_per_region(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((24,), r"grid: expected two ints >= 1, got 24 \(int\)"),
        (((4, 5.0),), r"grid: expected two ints >= 1, got \(4, 5.0\)"),
        (((0, 5),), r"grid: expected two ints >= 1, got \(0, 5\)"),
        (((4, 5), (2,)), r"region: expected two ints >= 1, got \(2,\)"),
        (((4, 5), (2, True)), r"region: expected two ints >= 1, got \(2, True\)"),
        (((4, 5), (0, 2)), r"region: expected two ints >= 1, got \(0, 2\)"),
        (((4, 5), (2, 5)), r"region: expected h \* w <= 9, got \(2, 5\)"),
        (((2**40, 2**40),), r"grid: expected at most 16777216 cells, got"),
        (((4, 5), (2, 2), "gpu"), r"device: expected a device that this PyTorch has, got 'gpu' \(str\): "),
        (((4, 5), (2, 2), 1.5), r"device: expected a device that this PyTorch has, got 1.5 \(float\): "),
    ],
)
def test_bad_grids(args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid_neighbours(*args)
