"""Spatial aggregation against a float64 loop; as a torch.library object; its errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gap_kernels import spatial_aggregate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.naive.aggregate import oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(
    grid: tuple[int, int] = (4, 5),
    channels: int = 6,
    length: int = 7,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features and similarity features of two samples."""
    generator = torch.Generator().manual_seed(seed)
    num_patches = grid[0] * grid[1]
    features = torch.randn(2, num_patches, channels, generator=generator)
    similarity = torch.randn(2, num_patches, length, generator=generator) + 0.3
    return features.to(dtype), similarity.to(dtype)


ANCHORS = torch.tensor([[-1, 0, 3, 7, 12, 19], [1, 2, 8, 13, -1, 18]])
PILLARS = torch.tensor([[True, False, True, False, False, False], [False, False, False, True, True, True]])


def check(
    features: Tensor, similarity: Tensor, anchors: Tensor, grid: tuple[int, int], **kwargs: Any
) -> Tensor:
    """Compare with the oracle and return the result."""
    expected = oracle(features, similarity, anchors, grid, **kwargs)
    collected = spatial_aggregate(features, similarity, anchors, grid, **kwargs)
    assert collected.dtype == features.dtype
    tolerance = TOLERANCE[features.dtype]
    torch.testing.assert_close(collected.double(), expected, rtol=tolerance, atol=tolerance)
    assert (collected[anchors < 0] == 0).all()
    return collected


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("self_weight", [1.0, None, 0.25])
@pytest.mark.parametrize("pillars", [PILLARS, None], ids=["pillars", "none"])
def test_weights_and_dtypes(dtype: torch.dtype, self_weight: float | None, pillars: Tensor | None) -> None:
    collected = check(
        *make(dtype=dtype), ANCHORS, (4, 5), radius=2.5, pillars=pillars, self_weight=self_weight
    )
    if pillars is not None:
        rows = make(dtype=dtype)[0].gather(1, ANCHORS.clamp(min=0)[:, :, None].expand(-1, -1, 6))
        chosen = pillars & (ANCHORS >= 0)
        assert torch.equal(collected[chosen], rows[chosen])


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_grids(data: st.DataObject) -> None:
    """Even, odd, a single row or column; anchors in any order, with repetitions and filler."""
    grid = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    features, similarity = make(
        grid,
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 20)),
        seed=data.draw(st.integers(0, 99)),
    )
    count = data.draw(st.integers(0, 9))
    anchor = st.lists(st.integers(-1, grid[0] * grid[1] - 1), min_size=count, max_size=count)
    anchors = torch.tensor([data.draw(anchor), data.draw(anchor)]).reshape(2, count).long()
    radius = data.draw(st.sampled_from([0.3, 1.0, 2.0, math.sqrt(5), 3.7, 100.0]))
    pillars = torch.rand(2, count) < 0.3 if data.draw(st.booleans()) else None
    self_weight = data.draw(st.sampled_from([None, 1.0, -0.5]))
    check(features, similarity, anchors, grid, radius=radius, pillars=pillars, self_weight=self_weight)


def test_a_collector_is_itself_plus_the_mean_of_equal_neighbours() -> None:
    features = torch.arange(5.0).reshape(1, 5, 1)
    similarity = torch.ones(1, 5, 3)
    anchors = torch.tensor([[2, 4]])
    # Weights by distance 0, 1, 2: 1, 1/2, 0.
    collected = spatial_aggregate(features, similarity, anchors, (1, 5), radius=2)
    torch.testing.assert_close(collected, torch.tensor([[[2.0 + 2.0 / 2], [4.0 + 1.5 / 1.5]]]))
    normalised = spatial_aggregate(features, similarity, anchors, (1, 5), radius=2, self_weight=None)
    torch.testing.assert_close(normalised, torch.tensor([[[2.0], [5.5 / 1.5]]]))
    down = spatial_aggregate(features, similarity, anchors, (5, 1), radius=2, self_weight=None)
    torch.testing.assert_close(down, normalised)


def test_dissimilar_patches_are_left_out() -> None:
    features, similarity = make((1, 3))
    similarity[:, 1], similarity[:, 2] = -similarity[:, 0], similarity[:, 0]
    features[:, 1] = 1e6
    collected = spatial_aggregate(features, similarity, torch.zeros(2, 1).long(), (1, 3), radius=4.0)
    torch.testing.assert_close(collected[:, 0], features[:, 0] + features[:, 2] / 3)


@pytest.mark.parametrize("radius", [1e-200, 0.5, 1.0])
@pytest.mark.parametrize("self_weight", [1.0, None])
def test_a_small_radius_leaves_each_anchor_alone(radius: float, self_weight: float | None) -> None:
    features, similarity = make()
    collected = check(features, similarity, ANCHORS, (4, 5), radius=radius, self_weight=self_weight)
    rows = features.gather(1, ANCHORS.clamp(min=0)[:, :, None].expand(-1, -1, 6))
    torch.testing.assert_close(collected, torch.where(ANCHORS[:, :, None] >= 0, rows, 0.0))


def test_an_infinite_radius_makes_distance_irrelevant() -> None:
    features, similarity = make()
    collected = check(features, similarity, ANCHORS, (4, 5), radius=math.inf)
    torch.testing.assert_close(
        collected, spatial_aggregate(features, similarity, ANCHORS, (4, 5), radius=1e9)
    )


def test_a_similarity_of_zeros_is_similar_to_nothing() -> None:
    features, similarity = make()
    similarity[:, 7] = 0.0
    anchors = torch.tensor([[7, 8], [7, 12]])
    normalised = check(features, similarity, anchors, (4, 5), radius=3.0, self_weight=None)
    assert (normalised[:, 0] == 0).all()
    assert torch.equal(check(features, similarity, anchors, (4, 5), radius=3.0)[:, 0], features[:, 7])


def test_the_length_of_similarity_vectors_does_not_matter() -> None:
    features, similarity = make()
    lengths = torch.logspace(-6, 6, 20)[:, None]
    torch.testing.assert_close(
        spatial_aggregate(features, similarity * lengths, ANCHORS, (4, 5), radius=3.0),
        spatial_aggregate(features, similarity, ANCHORS, (4, 5), radius=3.0),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_similarity_of_another_dtype(dtype: torch.dtype) -> None:
    features, similarity = make()
    check(features.to(torch.bfloat16), similarity.to(dtype), ANCHORS, (4, 5), radius=3.0)
    check(features.to(dtype), similarity, ANCHORS, (4, 5), radius=3.0)


def test_nan_in_a_similarity_vector_spoils_the_anchors_near_it() -> None:
    features, similarity = make()
    similarity[0, 0] = math.nan
    collected = spatial_aggregate(features, similarity, ANCHORS, (4, 5), radius=2.0, pillars=PILLARS)
    # Of 0 (itself), 7 (at a distance of 2.2), and the rest, which is farther away or a pillar.
    assert collected[0].isnan().all(-1).tolist() == [False, True, False, False, False, False]
    similarity[0, 0], similarity[0, 1] = 1.0, math.nan  # next to 0, less than 2 from 7
    collected = spatial_aggregate(features, similarity, ANCHORS, (4, 5), radius=2.0, pillars=PILLARS)
    assert collected[0].isnan().all(-1).tolist() == [False, True, False, True, False, False]
    assert not collected[1].isnan().any()


def test_nan_in_a_feature_spoils_its_channel_but_for_pillars_and_filler() -> None:
    features, similarity = make()
    features[0, 1, 2] = math.nan
    collected = spatial_aggregate(features, similarity, ANCHORS, (4, 5), radius=2.0, pillars=PILLARS)
    assert collected[0, :, 2].isnan().tolist() == [False, True, False, True, True, True]
    assert collected[0, :, [0, 1, 3, 4, 5]].isfinite().all()
    assert collected[1].isfinite().all()


def test_pillars_do_not_look_at_similarity() -> None:
    features, similarity = make()
    every = torch.ones_like(PILLARS)
    collected = spatial_aggregate(
        features, similarity * math.nan, ANCHORS, (4, 5), radius=2.0, pillars=every, self_weight=0.5
    )
    rows = features.gather(1, ANCHORS.clamp(min=0)[:, :, None].expand(-1, -1, 6))
    assert torch.equal(collected, torch.where(ANCHORS[:, :, None] >= 0, rows, 0.0))


@pytest.mark.parametrize("quantile", [0, 0.1, 0.25, 0.55, 0.123456789, 1])
def test_pillars_by_the_scores_of_the_anchors(quantile: float) -> None:
    """With ties, both infinities, zeros of both signs and NaN, which is no pillar and does not count."""
    features, similarity = make()
    scores = torch.tensor([[0.5, -math.inf, 2, math.inf, 0.0, -0.0, 0.5, 1, math.nan, 3]] * 2).repeat(1, 2)
    scores[1] = math.nan
    for anchors in (ANCHORS, torch.arange(20).flip(0).expand(2, -1), torch.tensor([[8, -1], [0, 1]])):
        given = {"radius": 2.5, "scores": scores, "pillar_quantile": quantile}
        collected = check(features, similarity, anchors, (4, 5), **given)
        assert torch.equal(
            collected[1], spatial_aggregate(features, similarity, anchors, (4, 5), radius=2.5)[1]
        )


def test_a_quantile_is_the_decimal_that_was_written() -> None:
    """0.55 of 20 is 11, and above that in floats: the twelfth of 21 scores is a pillar."""
    features, similarity = make((3, 7))
    every = torch.arange(21).expand(2, -1)
    given = {"radius": 2.5, "scores": every.float(), "pillar_quantile": 0.55}
    collected = check(features, similarity, every, (3, 7), **given)
    assert (collected == features).all(-1)[0].tolist() == [False] * 11 + [True] * 10


def test_strided_inputs() -> None:
    features, similarity = make()
    expected = spatial_aggregate(features, similarity, ANCHORS, (4, 5), radius=2.5, pillars=PILLARS)
    strided = spatial_aggregate(
        features.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([similarity[:, :1], similarity], 1)[:, 1:],
        ANCHORS.t().contiguous().t(),
        (4, 5),
        radius=2.5,
        pillars=PILLARS.t().contiguous().t(),
    )
    torch.testing.assert_close(strided, expected)
    shared = spatial_aggregate(
        features[:1].expand(2, -1, -1), similarity[:1].expand(2, -1, -1), ANCHORS[:1].expand(2, -1), (4, 5),
        radius=2.5, pillars=PILLARS[:1].expand(2, -1),
    )  # fmt: skip
    torch.testing.assert_close(shared, expected[:1].expand(2, -1, -1))


def test_empty_shapes() -> None:
    features, similarity = make()
    assert spatial_aggregate(features[:0], similarity[:0], ANCHORS[:0], (4, 5), radius=2.0).shape == (0, 6, 6)
    assert spatial_aggregate(features, similarity, ANCHORS[:, :0], (4, 5), radius=2.0).shape == (2, 0, 6)
    assert spatial_aggregate(features[..., :0], similarity, ANCHORS, (4, 5), radius=2.0).shape == (2, 6, 0)
    # Vectors without elements are vectors of zeros.
    check(features, similarity[..., :0], ANCHORS, (4, 5), radius=2.0)


def test_backward_is_refused() -> None:
    features, similarity = make()
    collected = spatial_aggregate(features.requires_grad_(), similarity, ANCHORS, (4, 5), radius=2.0)
    with pytest.raises(RuntimeError, match=r"gap_kernels\.spatial_aggregate has no gradient"):
        collected.sum().backward()


OP = torch.ops.gap_kernels.spatial_aggregate.default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("optional", [(PILLARS, 1.0), (None, None)])
def test_opcheck(dtype: torch.dtype, optional: tuple[Tensor | None, float | None]) -> None:
    opcheck(OP, (*make(dtype=dtype), ANCHORS, 5, 2.5, *optional))
    opcheck(OP, (*make(dtype=dtype), ANCHORS, 5, 2.5, None, 1.0, torch.rand(2, 20), 11, 20))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_and_export() -> None:
    def function(features: Tensor, similarity: Tensor, anchors: Tensor, pillars: Tensor) -> Tensor:
        grid = (features.shape[1] // 5, 5)
        collected = spatial_aggregate(features, similarity, anchors, grid, radius=2.5, pillars=pillars)
        return collected + spatial_aggregate(
            features, similarity, anchors, grid, radius=3.0, self_weight=None
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (4, 6):
        arguments = (*make((height, 5)), ANCHORS, PILLARS)
        assert torch.equal(compiled(*arguments), function(*arguments))

    class Module(torch.nn.Module):
        def forward(self, features: Tensor, similarity: Tensor, anchors: Tensor, pillars: Tensor) -> Tensor:
            return function(features, similarity, anchors, pillars)

    num_patches, num_anchors = 5 * torch.export.Dim("height", min=2), torch.export.Dim("num_anchors", min=2)
    shapes = ({1: num_patches}, {1: num_patches}, {1: num_anchors}, {1: num_anchors})
    program = torch.export.export(Module(), (*make(), ANCHORS, PILLARS), dynamic_shapes=shapes)
    arguments = (*make((7, 5)), ANCHORS[:, 1:], PILLARS[:, 1:])
    assert torch.equal(program.module()(*arguments), function(*arguments))


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        features = torch.empty(2, 20, 6, dtype=torch.bfloat16, device="cuda")
        anchors = torch.empty(2, 3, dtype=torch.int64, device="cuda")
        collected = spatial_aggregate(features, features.float(), anchors, (4, 5), radius=2.0)
    assert (collected.device.type, collected.shape, collected.dtype) == ("cuda", (2, 3, 6), torch.bfloat16)


X, E = make()


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X.int(), E, ANCHORS, (4, 5)), {}, "features: expected dtype torch.float32 or .*, got .*int32"),
        ((X[0], E, ANCHORS, (4, 5)), {}, r"features: expected 3 dimensions \[B, N, C\], got shape \[20, 6\]"),
        (
            (X, E[:, 1:], ANCHORS, (4, 5)),
            {},
            r"similarity_features: expected \[B, N, E\] with N = 20, got shape \[2, 19, 7\]",
        ),
        ((X, E, ANCHORS.int(), (4, 5)), {}, "anchors: expected dtype torch.int64, got .*int32"),
        ((X, E, ANCHORS[:1], (4, 5)), {}, r"anchors: expected \[B, M\] with B = 2, got shape \[1, 6\]"),
        ((X, E, ANCHORS + 1, (4, 5)), {}, r"anchors: expected values in -1..19, got 20"),
        ((X, E, ANCHORS - 1, (4, 5)), {}, r"anchors: expected values in -1..19, got -2"),
        ((X, E, ANCHORS, 20), {}, r"grid: expected two ints >= 1, got 20 \(int\)"),
        ((X, E, ANCHORS, (4, 5.0)), {}, r"grid: expected two ints >= 1, got \(4, 5.0\)"),
        ((X, E, ANCHORS, (2, 2, 5)), {}, r"grid: expected two ints"),
        ((X, E, ANCHORS, (5, 5)), {}, r"grid: expected H \* W = 20 .*, got \(5, 5\)"),
        ((X, E, ANCHORS, (-4, -5)), {}, r"grid: expected two ints >= 1, got \(-4, -5\)"),
        ((X[:, :0], E[:, :0], ANCHORS, (0, 5)), {}, r"grid: expected two ints >= 1"),
        ((X, E, ANCHORS, (4, 5)), {"radius": 0}, r"radius: expected a float > 0, got 0 \(int\)"),
        ((X, E, ANCHORS, (4, 5)), {"radius": math.nan}, "radius: expected a float > 0, got nan"),
        ((X, E, ANCHORS, (4, 5)), {"radius": "1"}, r"radius: expected a float > 0, got '1' \(str\)"),
        ((X, E, ANCHORS, (4, 5)), {"radius": True}, r"radius: expected a float > 0, got True \(bool\)"),
        (
            (X, E, ANCHORS, (4, 5)),
            {"self_weight": "1"},
            r"self_weight: expected a finite float or None, got '1' \(str\)",
        ),
        (
            (X, E, ANCHORS, (4, 5)),
            {"pillar_quantile": 0.5},
            r"scores: expected a tensor \[B, N\] with pillar_quantile 0.5 \(float\), got None",
        ),
        (
            (X, E, ANCHORS, (4, 5)),
            {"scores": X[..., 0]},
            "pillar_quantile: expected a float in 0..1 with at most 9 decimals, got None",
        ),
        (
            (X, E, ANCHORS, (4, 5)),
            {"scores": X[..., 0], "pillar_quantile": 1.5},
            r"pillar_quantile: expected a float in 0..1 with at most 9 decimals, got 1.5 \(float\)",
        ),
        (
            (X, E, ANCHORS, (4, 5)),
            {"scores": ANCHORS, "pillar_quantile": 0.5},
            "scores: expected dtype torch.float32, got .*int64",
        ),
        (
            (X, E, ANCHORS, (4, 5)),
            {"scores": X[..., 0], "pillar_quantile": 0.5, "pillars": PILLARS},
            r"pillars: expected None with pillar_quantile=0.5, got shape \[2, 6\]",
        ),
        (
            (X, E, ANCHORS, (4, 5)),
            {"pillars": PILLARS.float()},
            "pillars: expected dtype torch.bool, got .*float32",
        ),
        (
            (X, E, ANCHORS, (4, 5)),
            {"pillars": PILLARS[:, 1:]},
            r"pillars: expected \[B, M\] with M = 6, got shape \[2, 5\]",
        ),
    ],
)
def test_bad_arguments(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spatial_aggregate(*args, **{"radius": 2.0, **kwargs})
