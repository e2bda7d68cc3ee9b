"""Dense back ends under our name."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from support.comparison import error
from support.prompts import make_prompt
from support.tiny import build, generate
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import gap_triton  # noqa: F401
from gap_triton.integration import attention


def flash_stand_in(query, key, value, dropout_p, softmax_scale, causal):
    """What flash_attn_func computes, in its own layout [B, S, H, D], causal aligned to the bottom right."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    bottom_right = torch.ones(query.shape[2], key.shape[2]).tril(key.shape[2] - query.shape[2]).bool()
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bottom_right if causal else None, scale=softmax_scale, enable_gqa=True
    )
    return output.transpose(1, 2)


class OnGPU(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


@pytest.fixture
def module() -> types.SimpleNamespace:
    return types.SimpleNamespace(is_causal=True, num_key_value_groups=2, layer_idx=0)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (4, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_path_equals_sdpa_path(
    module: types.SimpleNamespace, queries: int, keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.is_causal = causal
    query = torch.randn(2, 4, queries, 16)
    key, value = torch.randn(2, 2, 2, keys, 16)
    expected, _ = attention.gap_attention_forward(module, query, key, value, None, scaling=0.3)
    monkeypatch.setattr(attention, "flash_attn_func", lambda: flash_stand_in)
    monkeypatch.setattr(attention, "_flash_applies", lambda *_: True)
    on_gpu = query.as_subclass(OnGPU)
    actual, weights = attention.gap_attention_forward(module, on_gpu, key, value, None, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("name", ["unknown", "output_attentions", *sorted(attention.IDLE)])
def test_what_sdpa_may_read_is_handed_on(
    name: str, module: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but what is known to be of no use to it, which layers hand to every attention."""
    handed: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *args, **kwargs: handed.append((args, kwargs))
    )
    tensors = torch.randn(3, 1, 4, 1, 16).unbind()
    options = {"dropout": 0.5, "scaling": 0.3, "is_causal": False}
    attention.gap_attention_forward(module, *tensors, None, **options, **{name: 1})
    ((args, kwargs),) = handed
    bound = inspect.signature(sdpa_attention_forward).bind(*args, **kwargs).arguments
    assert {key: bound[key] for key in options} == options
    assert kwargs == ({} if name in attention.IDLE else {name: 1})


def test_flash_is_not_asked_for_elsewhere_than_on_a_gpu(
    module: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_flash_applies", lambda *_: pytest.fail("asked"))
    query, key, value = torch.randn(3, 2, 4, 5, 16, dtype=torch.bfloat16).unbind()
    attention.gap_attention_forward(module, query, key[:, :2], value[:, :2], None)


def test_flash_applies_only_in_half_precision_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_attn_func", lambda: flash_stand_in)

    def applies(dtype=torch.bfloat16, mask=None, dim=64, **kwargs) -> bool:
        query = types.SimpleNamespace(dtype=dtype, shape=(1, 2, 3, dim))
        return attention._flash_applies(query, mask, kwargs)

    assert applies()
    assert not applies(dtype=torch.float32)
    assert not applies(mask=torch.ones(1))
    assert not applies(dim=512)
    assert not applies(softcap=30.0)
    monkeypatch.setattr(attention, "flash_attn_func", lambda: None)
    assert not applies()


@pytest.mark.parametrize("name", ["llava", "llava_onevision/qwen2"])
def test_vision_towers_under_the_name_are_plain_dense_attention(name: str) -> None:
    inputs = make_prompt(name, "left-padded")
    dense = generate(build(name, "sdpa"), inputs)
    vision_only = build(name, {"vision_config": "gap_triton", "text_config": "sdpa"})
    assert vision_only.config.vision_config._attn_implementation == "gap_triton"
    assert error(generate(vision_only, inputs), dense) == 0.0
