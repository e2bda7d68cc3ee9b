"""Attention against a float64 loop over samples, heads and rows; as a torch.library object; its errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gap_kernels import AttentionOutput, attention, blocks, visual_importance
from gap_kernels.flash_attention import reference
from support.naive.attention import TOLERANCE, oracle
from support.naive.importance import make
from support.naive.importance import oracle as importance_oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_all(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value for shape (B, Hq, Hkv, Q, S, D)."""
    query, key = make(shape, dtype)
    return query, key, make(shape, dtype, seed=1)[1]


def check(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> AttentionOutput:
    """Compare with the oracles, importance included where it is asked for."""
    result = attention(query, key, value, **kwargs)
    rows, columns = kwargs.pop("importance_rows", None), kwargs.pop("importance_columns", None)
    output, lse = oracle(query, key, value, **kwargs)
    tolerance = TOLERANCE[query.dtype]
    computed = torch.float64 if query.dtype == torch.float64 else torch.float32
    assert result.output.dtype == query.dtype
    assert result.lse.dtype == computed
    torch.testing.assert_close(result.output.double(), output, rtol=tolerance, atol=tolerance)
    exact = TOLERANCE[computed]
    torch.testing.assert_close(result.lse.double(), lse, rtol=exact, atol=exact)
    if columns is None:
        assert result.importance is None
    else:
        expected, _ = importance_oracle(query, key, columns, rows, **kwargs)
        assert result.importance.dtype == computed
        torch.testing.assert_close(result.importance.double(), expected, rtol=10 * exact, atol=exact)
        assert torch.equal(
            result.importance,
            attention(query, key, value, importance_rows=rows, importance_columns=columns, **kwargs)[2],
        )
    return result


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("causal", [True, False])
def test_heads_and_dtypes(heads: tuple[int, int], dtype: torch.dtype, causal: bool) -> None:
    check(*make_all((2, *heads, 7, 7, 80), dtype), causal=causal)


@pytest.mark.parametrize("head_dim", [1, 8, 64, 72, 80, 96, 128, 200, 256])
def test_head_dims(head_dim: int) -> None:
    check(*make_all((1, 2, 1, 4, 5, head_dim)), importance_columns=torch.tensor([[1, 0, 3]]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("past", [1, 6])
def test_earlier_keys(past: int, causal: bool) -> None:
    check(*make_all((2, 4, 2, 5, 5 + past, 8)), causal=causal)


def test_one_row_at_a_time_equals_all_at_once() -> None:
    query, key, value = make_all((1, 2, 1, 6, 6, 8))
    whole = attention(query, key, value)
    for row in range(6):
        step = attention(query[:, :, row : row + 1], key[:, :, : row + 1], value[:, :, : row + 1])
        torch.testing.assert_close(step.output, whole.output[:, :, row : row + 1])
        torch.testing.assert_close(step.lse, whole.lse[:, :, row : row + 1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, causal: bool) -> None:
    query, key, value = make_all((3, 2, 1, 6, 8, 16))
    real = torch.ones(3, 8, dtype=torch.bool)
    if side == "left":
        real[0, :4] = False
        real[2, :1] = False
    else:
        real[0, 5:] = False
    hidden = ~real[:, None].expand(3, 1, 8)
    key[hidden] = math.nan  # what the mask hides must not be touched by arithmetic
    value[hidden] = math.nan
    asked = {"importance_rows": torch.tensor([[2]] * 3), "importance_columns": torch.tensor([[2, 1]] * 3)}
    result = check(query, key, value, attention_mask=real, causal=causal, **asked)
    assert result.output.isfinite().all()


def test_rows_that_see_nothing() -> None:
    query, key, value = make_all((2, 2, 1, 4, 4, 8))
    real = torch.tensor([[False] * 4, [False, False, True, True]])
    output, lse, _ = check(query, key, value, attention_mask=real)
    assert (output[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert (output[1, :, :2] == 0).all()
    assert (lse[1, :, :2] == -math.inf).all()
    assert lse[1, :, 2:].isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_importance_is_that_of_visual_importance(causal: bool) -> None:
    query, key, value = make_all((2, 6, 2, 7, 9, 16))
    columns = torch.tensor([[1, 2, -1, 3], [5, 0, 2, 6]])
    rows = torch.tensor([[-1, 4, -1, 6], [3, -1, 5, 6]])
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 5] = False
    options = {"attention_mask": real, "causal": causal}
    result = check(query, key, value, importance_rows=rows, importance_columns=columns, **options)
    expected = visual_importance(query, key, columns, rows=rows, **options)
    torch.testing.assert_close(result.importance, expected)
    assert result.importance[0, 2] == 0
    # Its log-sum-exp serves the operator, too.
    index = rows.clamp(min=0)[:, None].expand(-1, 6, -1)
    lse = result.lse.gather(2, index)
    torch.testing.assert_close(
        visual_importance(query, key, columns, rows=rows, lse=lse, **options), expected
    )


def test_importance_of_the_last_row_by_default() -> None:
    query, key, value = make_all((2, 2, 2, 5, 5, 8))
    columns = torch.arange(5).expand(2, 5)
    for causal in (True, False):
        result = check(query, key, value, causal=causal, importance_columns=columns)
        torch.testing.assert_close(result.importance.sum(-1), torch.ones(2))


def test_empty_shapes() -> None:
    query, key, value = make_all((2, 2, 1, 3, 3, 8))
    none = torch.empty(2, 0, dtype=torch.int64)
    assert attention(query, key, value, importance_columns=none).importance.shape == (2, 0)
    no_rows = attention(query, key, value, importance_rows=none, importance_columns=torch.tensor([[1]] * 2))
    assert no_rows.importance.tolist() == [[0.0], [0.0]]
    output, lse, _ = attention(query[:0], key[:0], value[:0])
    assert output.shape == (0, 2, 3, 8)
    assert lse.shape == (0, 2, 3)


def test_scale() -> None:
    query, key, value = make_all((1, 2, 2, 5, 5, 8))
    check(query, key, value, scale=0.9, importance_columns=torch.tensor([[0, 1, 2]]))
    uniform = attention(query, key, value, scale=0.0)
    torch.testing.assert_close(uniform.output[:, :, -1], value.mean(2))


def test_large_scores_do_not_overflow() -> None:
    query, key, value = make_all((1, 2, 2, 5, 5, 8))
    output, lse, _ = attention(query * 1e4, key * 1e4, value)
    assert output.isfinite().all()
    assert lse.isfinite().all()


def test_nan_in_a_visible_key_spoils_the_rows_that_see_it() -> None:
    query, key, value = make_all((1, 2, 1, 5, 5, 8))
    expected = attention(query, key, value)
    key[0, 0, 3] = math.nan
    output, lse, _ = attention(query, key, value)
    assert output[:, :, 3:].isnan().all()
    assert lse[:, :, 3:].isnan().all()
    torch.testing.assert_close(output[:, :, :3], expected.output[:, :, :3])


def test_strided_inputs() -> None:
    query, key, value = make_all((2, 4, 2, 6, 6, 8))
    columns = torch.tensor([[0, 1], [2, 3]])
    expected = attention(query, key, value, importance_columns=columns)
    # [B, S, H, D] storage, as attention projections leave it; a last dimension with a stride; an expanded batch.
    query_t = query.transpose(1, 2).contiguous().transpose(1, 2)
    key_t = key.transpose(2, 3).contiguous().transpose(2, 3)
    assert not query_t.is_contiguous()
    assert key_t.stride(-1) != 1
    for given, wanted in zip(
        attention(query_t, key_t, value, importance_columns=columns), expected, strict=True
    ):
        torch.testing.assert_close(given, wanted)
    expanded = value[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        attention(query, key, expanded).output, attention(query, key, expanded.contiguous()).output
    )


def test_blocks_of_rows_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*make_all((2, 2, 1, 7, 9, 8)), True, torch.rand(2, 9) < 0.7, None, None, None)
    expected = reference.attention(*arguments)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    for given, wanted in zip(reference.attention(*arguments), expected, strict=True):
        torch.testing.assert_close(given, wanted)


def test_backward_is_refused() -> None:
    query, key, value = make_all((1, 2, 2, 5, 5, 8))
    output, _, _ = attention(query.requires_grad_(), key, value)
    with pytest.raises(RuntimeError, match=r"gap_kernels\.attention\w* has no gradient"):
        output.sum().backward()


OP = torch.ops.gap_kernels.attention.default


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_opcheck(full: bool, dtype: torch.dtype) -> None:
    query, key, value = make_all((2, 4, 2, 5, 7, 8), dtype)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    optional = (None, None, None, None)
    if full:
        mask = torch.ones(2, 7, dtype=torch.bool)
        optional = (mask, 0.3, torch.tensor([[4], [-1]]), torch.tensor([[1, 2], [3, -1]]))
    opcheck(OP, (query, key, value, full, *optional))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_and_export() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        return (
            *attention(query, key, value, importance_columns=columns),
            *attention(query, key, value, causal=False, importance_columns=columns),
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    columns = torch.tensor([[0, 1], [2, 3]])
    for num_query in (5, 6):
        arguments = (*make_all((2, 4, 2, num_query, 7, 8)), columns)
        for given, wanted in zip(compiled(*arguments), function(*arguments), strict=True):
            assert torch.equal(given, wanted)

    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
            return function(query, key, value, columns)

    num_query, num_keys = torch.export.Dim("num_query", min=2), torch.export.Dim("num_keys", min=2)
    shapes = ({2: num_query}, {2: num_keys}, {2: num_keys}, {})
    example = (*make_all((2, 4, 2, 5, 9, 8)), columns)
    program = torch.export.export(
        Module(),
        example,
        dynamic_shapes={"query": shapes[0], "key": shapes[1], "value": shapes[2], "columns": {}},
    )
    arguments = (*make_all((2, 4, 2, 4, 8, 8)), columns)
    for given, wanted in zip(program.module()(*arguments), function(*arguments), strict=True):
        assert torch.equal(given, wanted)


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 8, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(2, 2, 7, 8, dtype=torch.bfloat16, device="cuda")
        columns = torch.empty(2, 3, dtype=torch.int64, device="cuda")
        output, lse, importance = attention(query, key, key, importance_columns=columns)
    assert {tensor.device.type for tensor in (output, lse, importance)} == {"cuda"}
    assert (output.shape, output.dtype) == ((2, 4, 5, 8), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)
    assert (importance.shape, importance.dtype) == ((2, 3), torch.float32)


QUERY, KEY, VALUE = make_all((2, 4, 2, 5, 6, 8))
COLUMNS = torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((QUERY.int(), KEY, VALUE), {}, "query: expected dtype torch.float32 or .*, got .*int32"),
        ((QUERY[0], KEY, VALUE), {}, r"query: expected 4 dimensions \[B, Hq, Q, D\], got shape \[4, 5, 8\]"),
        ((QUERY[:, :, :0], KEY, VALUE), {}, r"query: expected at least one row, got shape \[2, 4, 0, 8\]"),
        ((QUERY, KEY.half(), VALUE), {}, "key: expected dtype torch.float32, got .*float16"),
        ((QUERY, KEY, VALUE[:, :, 1:]), {}, r"value: expected \[B, Hkv, S, D\] with S = 6, got shape"),
        ((QUERY, KEY, VALUE[..., :4]), {}, r"value: expected \[B, Hkv, S, D\] with D = 8, got shape"),
        ((QUERY[:, :3], KEY, VALUE), {}, "query: expected a multiple of the 2 heads of key, got 3 heads"),
        ((QUERY, KEY[:, :, :4], VALUE[:, :, :4]), {}, "key: expected at least the 5 positions of query"),
        (make_all((1, 1, 1, 2, 2, 257)), {}, r"query: expected D in 1..256, got shape \[1, 1, 2, 257\]"),
        ((QUERY, KEY, VALUE), {"causal": 1}, r"causal: expected a bool, got 1 \(int\)"),
        ((QUERY, KEY, VALUE), {"scale": "1"}, r"scale: expected a finite float or None, got '1' \(str\)"),
        (
            (QUERY, KEY, VALUE),
            {"attention_mask": torch.ones(2, 5, dtype=torch.bool)},
            r"attention_mask: expected \[B, S\] with S = 6, got shape \[2, 5\]",
        ),
        (
            (QUERY, KEY, VALUE),
            {"importance_rows": COLUMNS},
            "importance_rows: expected importance_columns beside it, got None",
        ),
        (
            (QUERY, KEY, VALUE),
            {"importance_columns": COLUMNS.int()},
            "importance_columns: expected dtype torch.int64, got .*int32",
        ),
        (
            (QUERY, KEY, VALUE),
            {"importance_columns": COLUMNS + 2},
            "importance_columns: expected values in -1..4, got 5",
        ),
        (
            (QUERY, KEY, VALUE),
            {"importance_columns": COLUMNS, "importance_rows": COLUMNS[:1]},
            r"importance_rows: expected \[B, R\] with B = 2, got shape \[1, 2\]",
        ),
        (
            (QUERY, KEY, VALUE),
            {"importance_columns": COLUMNS, "importance_rows": COLUMNS - 2},
            "importance_rows: expected values in -1..4, got -2",
        ),
    ],
)
def test_bad_arguments(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*args, **kwargs)
