"""What only a GPU can show: the same results on CUDA as on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.comparison import error
from support.prompts import BATCHES, make_prompt
from support.tiny import build, generate

import gap_triton
from gap_triton import GapConfig
from gap_triton.integration import attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("batch", BATCHES)
def test_pruned_generation_equals_the_cpu(batch: str) -> None:
    inputs = make_prompt("llava", batch)
    model = build("llava", "gap_triton")
    gap_triton.configure(model, GapConfig(keep=0.4, layer=1))
    on_cpu = generate(model, inputs)
    selection = gap_triton.last_selection(model)
    on_gpu = generate(model.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()})
    assert torch.equal(gap_triton.last_selection(model).index.cpu(), selection.index)
    assert torch.equal(on_gpu.sequences.cpu(), on_cpu.sequences)
    assert (
        max(float((a.cpu() - b).abs().max()) for a, b in zip(on_gpu.logits, on_cpu.logits, strict=True))
        < 1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keep_everything_is_sdpa_bit_for_bit_in_half_precision(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(attention, "flash_attn_func", lambda: None)
    inputs = {name: tensor.cuda() for name, tensor in make_prompt("llava", "left-padded").items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    dense = generate(build("llava", "sdpa").to("cuda", dtype), inputs)
    model = build("llava", "gap_triton").to("cuda", dtype)
    gap_triton.configure(model, GapConfig(keep=1.0))
    assert error(generate(model, inputs), dense) == 0.0


def test_flash_attention_equals_sdpa() -> None:
    if attention.flash_attn_func() is None:
        pytest.skip("flash-attn is not installed")
    module = type("Module", (), {"is_causal": True, "num_key_value_groups": 2, "layer_idx": 0})()
    query = torch.randn(2, 4, 33, 64, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 33, 64, device="cuda", dtype=torch.bfloat16)
    assert attention._flash_applies(query, None, {})
    flash, _ = attention.gap_attention_forward(module, query, key, value, None)
    dense = attention.sdpa_attention_forward(module, query, key, value, None)[0]
    torch.testing.assert_close(flash, dense, atol=2e-2, rtol=2e-2)
