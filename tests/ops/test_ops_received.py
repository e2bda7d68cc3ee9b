"""Attention received per key against a float64 loop; as a torch.library object; its errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gap_kernels import attention, attention_received, blocks
from gap_kernels.received import reference
from support.naive.importance import make as make_pair
from support.naive.received import TOLERANCE, oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Query and key for shape (B, H, Hkv, S, D)."""
    batch, heads, key_heads, num_tokens, head_dim = shape
    return make_pair((batch, heads, key_heads, num_tokens, num_tokens, head_dim), dtype)


def check(query: Tensor, key: Tensor, **kwargs: Any) -> Tensor:
    """Compare with the oracle, with and without the log-sum-exp given, and return the result."""
    expected, lse = oracle(query, key, **kwargs)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[query.dtype]
    for given in (lse.to(dtype), None):
        received = attention_received(query, key, lse=given, **kwargs)
        assert received.dtype == dtype
        torch.testing.assert_close(received.double(), expected, rtol=10 * tolerance, atol=tolerance)
    return received


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("causal", [True, False])
def test_heads_and_dtypes(heads: tuple[int, int], dtype: torch.dtype, causal: bool) -> None:
    received = check(*make((2, *heads, 7, 80), dtype), causal=causal)
    torch.testing.assert_close(received.sum(-1), torch.ones_like(received[:, 0]))


@pytest.mark.parametrize("head_dim", [1, 8, 64, 72, 96, 128, 200, 256])
def test_head_dims(head_dim: int) -> None:
    check(*make((1, 2, 1, 5, head_dim)))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_gets_nothing_and_is_left_out_of_the_mean(causal: bool) -> None:
    query, key = make((3, 2, 1, 6, 16))
    real = torch.tensor([[False, False, True, True, True, True], [True, True, True, False, False, False]])
    real = torch.cat([real, torch.tensor([[True, False, True, True, False, True]])])
    hidden = ~real[:, None]
    query[hidden.expand(3, 2, 6)] = math.nan  # what the mask hides must not be touched by arithmetic
    key[hidden] = math.nan
    received = check(query, key, attention_mask=real, causal=causal)
    assert (received[~real] == 0).all()
    torch.testing.assert_close(received.sum(-1), torch.ones(3))
    compact = attention_received(query[1:2, :, :3], key[1:2, :, :3], causal=causal)
    torch.testing.assert_close(received[1:2, :3], compact)


def test_a_sample_of_padding_gets_zero() -> None:
    query, key = make((2, 2, 1, 4, 8))
    real = torch.tensor([[False] * 4, [True] * 4])
    assert check(query, key, attention_mask=real)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [[0, 9], [0, 4, 5, 9], [0, 0, 3, 3, 9, 9]])
def test_packed_sequences(bounds: list[int], causal: bool) -> None:
    query, key = make((1, 4, 2, 9, 8))
    received = check(query, key, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), causal=causal)
    for begin, end in itertools.pairwise(bounds):
        alone = attention_received(query[:, :, begin:end], key[:, :, begin:end], causal=causal)
        torch.testing.assert_close(received[:, begin:end], alone)


def test_packed_sequences_with_padding() -> None:
    query, key = make((1, 2, 2, 9, 8))
    real = torch.tensor([[True, False, True, True, False, False, True, True, False]])
    bounds = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    received = check(query, key, cu_seqlens=bounds, attention_mask=real)
    assert (received[~real] == 0).all()


def test_causal_rows_see_earlier_keys_only() -> None:
    query, key = make((1, 2, 2, 2, 8))
    received = check(query, key, causal=True)
    first = torch.softmax((query[:, :, 1:] @ key.transpose(-1, -2)) * 8**-0.5, -1)[..., 0].mean()
    torch.testing.assert_close(received[0, 0], (1 + first) / 2)


def test_the_log_sum_exp_of_attention_serves() -> None:
    query, key = make((2, 4, 2, 7, 16))
    real = torch.rand(2, 7) < 0.7
    real[:, 0] = True
    for causal in (False, True):
        lse = attention(query, key, key, attention_mask=real, causal=causal).lse
        received = attention_received(query, key, attention_mask=real, causal=causal, lse=lse)
        torch.testing.assert_close(
            received, attention_received(query, key, attention_mask=real, causal=causal)
        )


def test_the_given_log_sum_exp_is_used() -> None:
    query, key = make((1, 2, 2, 5, 8))
    lse = oracle(query, key)[1].float() + math.log(2.0)
    torch.testing.assert_close(attention_received(query, key, lse=lse), attention_received(query, key) / 2)


def test_empty_shapes() -> None:
    query, key = make((2, 2, 1, 3, 8))
    assert attention_received(query[:0], key[:0]).shape == (0, 3)
    assert attention_received(query[:, :, :0], key[:, :, :0]).shape == (2, 0)
    bounds = torch.zeros(1, dtype=torch.int32)
    assert attention_received(query[:1, :, :0], key[:1, :, :0], cu_seqlens=bounds).shape == (1, 0)


def test_scale() -> None:
    query, key = make((1, 2, 2, 5, 8))
    check(query, key, scale=0.9)
    uniform = attention_received(query, key, scale=0.0)
    torch.testing.assert_close(uniform, torch.full((1, 5), 0.2))


def test_large_scores_do_not_overflow() -> None:
    query, key = make((1, 2, 2, 5, 8))
    received = attention_received(query * 1e4, key * 1e4)
    torch.testing.assert_close(received.sum(-1), torch.ones(1))


def test_nan_in_a_real_row_spoils_what_it_sees() -> None:
    query, key = make((2, 2, 1, 5, 8))
    query[0, 0, 2] = math.nan
    received = attention_received(query, key, causal=True)
    assert received[0, :3].isnan().all()
    assert received[0, 3:].isfinite().all()
    assert received[1].isfinite().all()


def test_strided_inputs() -> None:
    query, key = make((2, 4, 2, 6, 8))
    real = torch.tensor([[True, True, True, True, True, False]]).expand(2, -1)
    expected = attention_received(query, key, attention_mask=real.contiguous())
    # [B, S, H, D] storage, as projections leave it, and a last dimension with a stride.
    query_t = query.transpose(1, 2).contiguous().transpose(1, 2)
    key_t = key.transpose(2, 3).contiguous().transpose(2, 3)
    assert not query_t.is_contiguous()
    assert key_t.stride(-1) != 1
    torch.testing.assert_close(attention_received(query_t, key_t, attention_mask=real), expected)


def test_blocks_of_rows_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = make((1, 2, 1, 7, 8))
    bounds = torch.tensor([0, 2, 7], dtype=torch.int32)
    arguments = (query, key, torch.rand(1, 7) < 0.7, bounds, True, None, None)
    expected = reference.attention_received(*arguments)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    torch.testing.assert_close(reference.attention_received(*arguments), expected)


def test_backward_is_refused() -> None:
    query, key = make((1, 2, 2, 5, 8))
    received = attention_received(query.requires_grad_(), key)
    with pytest.raises(RuntimeError, match=r"gap_kernels\.attention\w* has no gradient"):
        received.sum().backward()


OP = torch.ops.gap_kernels.attention_received.default


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_opcheck(full: bool, dtype: torch.dtype) -> None:
    query, key = make((1, 4, 2, 5, 8), dtype)
    optional = (None, None, False, None, None)
    if full:
        mask = torch.tensor([[True, True, False, True, True]])
        optional = (mask, torch.tensor([0, 3, 5], dtype=torch.int32), True, 0.3, torch.zeros(1, 4, 5))
    opcheck(OP, (query, key, *optional))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_and_export() -> None:
    def function(query: Tensor, key: Tensor, bounds: Tensor) -> Tensor:
        return attention_received(query, key, cu_seqlens=bounds) + attention_received(query, key)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (5, 6):
        arguments = (*make((1, 4, 2, num_tokens, 8)), torch.tensor([0, 2, num_tokens], dtype=torch.int32))
        assert torch.equal(compiled(*arguments), function(*arguments))

    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, bounds: Tensor) -> Tensor:
            return function(query, key, bounds)

    num_tokens = torch.export.Dim("num_tokens", min=2)
    shapes = {"query": {2: num_tokens}, "key": {2: num_tokens}, "bounds": {}}
    example = (*make((1, 4, 2, 5, 8)), torch.tensor([0, 2, 5], dtype=torch.int32))
    program = torch.export.export(Module(), example, dynamic_shapes=shapes)
    arguments = (*make((1, 4, 2, 9, 8)), torch.tensor([0, 4, 9], dtype=torch.int32))
    assert torch.equal(program.module()(*arguments), function(*arguments))


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 8, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(2, 2, 5, 8, dtype=torch.bfloat16, device="cuda")
        received = attention_received(query, key)
    assert (received.device.type, received.shape, received.dtype) == ("cuda", (2, 5), torch.float32)


QUERY, KEY = make((2, 4, 2, 5, 8))
BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((QUERY.int(), KEY), {}, "query: expected dtype torch.float32 or .*, got .*int32"),
        ((QUERY[0], KEY), {}, r"query: expected 4 dimensions \[B, H, S, D\], got shape \[4, 5, 8\]"),
        ((QUERY, KEY[:, :, 1:]), {}, r"key: expected \[B, Hkv, S, D\] with S = 5, got shape \[2, 2, 4, 8\]"),
        ((QUERY[:, :3], KEY), {}, "query: expected a multiple of the 2 heads of key, got 3 heads"),
        ((QUERY[..., :0], KEY[..., :0]), {}, r"query: expected D in 1..256, got shape \[2, 4, 5, 0\]"),
        ((QUERY, KEY), {"causal": None}, r"causal: expected a bool, got None \(NoneType\)"),
        ((QUERY, KEY), {"scale": "1"}, r"scale: expected a finite float or None, got '1' \(str\)"),
        (
            (QUERY, KEY),
            {"attention_mask": torch.ones(2, 5)},
            "attention_mask: expected dtype torch.bool, got .*float32",
        ),
        ((QUERY, KEY), {"cu_seqlens": BOUNDS}, r"query: expected B = 1 beside cu_seqlens, got shape \[2, 4"),
        (
            (QUERY[:1], KEY[:1]),
            {"cu_seqlens": BOUNDS.long()},
            "cu_seqlens: expected dtype torch.int32, got .*int64",
        ),
        ((QUERY[:1], KEY[:1]), {"cu_seqlens": BOUNDS[:0]}, "cu_seqlens: expected at least one entry"),
        ((QUERY[:1], KEY[:1]), {"cu_seqlens": BOUNDS[:2]}, r"from 0 to S = 5, got \[0, 2\]"),
        ((QUERY[:1], KEY[:1]), {"cu_seqlens": BOUNDS[1:]}, r"from 0 to S = 5, got \[2, 5\]"),
        (
            (QUERY[:1], KEY[:1]),
            {"cu_seqlens": BOUNDS[[0, 2, 1, 2]]},
            r"cu_seqlens: expected ascending values from 0 to S = 5, got \[0, 5, 2, 5\]",
        ),
        ((QUERY, KEY), {"lse": torch.zeros(2, 2, 5)}, r"lse: expected \[B, H, S\] with H = 4"),
    ],
)
def test_bad_arguments(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_received(*args, **kwargs)
