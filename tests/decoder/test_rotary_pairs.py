"""Which channels a model's rotary embedding turns, found by running it; and what it turned, turned back by one operator."""

from __future__ import annotations

import importlib
from typing import Any

import gap_kernels
import pytest
import torch
from support.installed_types import build_or_skip
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gap_triton.integration.supported_models import find_parts
from gap_triton.prefill import unrotated as unrotation
from gap_triton.prefill.rotary_pairs import pairs_of, rotate

TOLERANCE = 1e-5
D = 32
# By module of transformers, how many columns cos and sin have: of halves, of neighbours, of some of the channels, with one
# column for a pair, of the last channels, one tensor at a time.
MODELS = {
    "llama": 32,
    "cohere": 32,
    "glm": 16,
    "ernie4_5": 32,
    "phi3": 24,
    "gpt_oss": 16,
    "deepseek_v4": 8,
    "gemma4": 32,
    "qwen3_next": 8,
}


def function_of(name: str) -> Any:
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError:
        pytest.skip(f"this transformers has no {name}")
    return module.apply_rotary_pos_emb


def of_sections(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mrope_section: list[int]
) -> tuple[Tensor, Tensor]:
    """M-RoPE as transformers 4.57 has it in Qwen2.5-VL: of each axis the columns that belong to it."""
    doubled = mrope_section * 2
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(each.split(doubled, dim=-1))], dim=-1)[:, None]
        for each in (cos, sin)
    )

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1) * sin

    return turned(q), turned(k)


def angles(width: int, axes: int | None = None) -> tuple[Tensor, Tensor]:
    """Cos and sin of five rows of two samples, the same in both halves, as embeddings have them."""
    generator = torch.Generator().manual_seed(width)
    half = 9 * torch.randn(*([] if axes is None else [axes]), 2, 5, width // 2, generator=generator)
    angle = torch.cat([half, half], dim=-1)
    return angle.cos(), angle.sin()


def assert_turned_back(rotation: Any, sections: Any, width: int, cos: Tensor, sin: Tensor) -> None:
    pairs = pairs_of(rotation, sections, D, cos)
    assert pairs is not None
    query, key = torch.randn(2, 4, 5, D), torch.randn(2, 1, 5, D)
    given = rotate(rotation, sections, query, key, cos, sin)
    turned = int((pairs[1] >= 0).sum())
    assert turned == min(D, 2 * width if rotation.__module__.endswith(("gpt_oss", "deepseek_v4")) else width)
    for found, before in zip(gap_kernels.unrotate(*given, cos, sin, pairs), (query, key), strict=True):
        torch.testing.assert_close(found, before, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", list(MODELS))
def test_rotations_of_transformers(name: str) -> None:
    width, rotation = MODELS[name], function_of(name)
    cos, sin = angles(width)
    if name == "cohere":  # neighbours have the same
        cos, sin = (each[..., : width // 2].repeat_interleave(2, dim=-1) for each in (cos, sin))
    assert_turned_back(rotation, None, width, cos, sin)


def test_axes_that_share_the_channels() -> None:
    assert_turned_back(of_sections, (4, 6, 6), D, *angles(D, axes=3))


def shifted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos[:, None] + 1, k * sin[:, None]


def failing(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("needs a GPU")


def other_way(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return function_of("llama")(q, k, cos, -sin)


@pytest.mark.parametrize("rotation", [shifted, failing, other_way])
def test_what_is_no_such_rotation_has_no_pairs(rotation: Any) -> None:
    assert pairs_of(rotation, None, D, angles(D)[0]) is None


def test_real_numbers_tell_also_while_operators_are_traced() -> None:
    def traced(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return function_of("llama")(q, k, cos, sin)

    expected = pairs_of(function_of("llama"), None, D, angles(D)[0])
    with FakeTensorMode():
        found = pairs_of(traced, None, D, torch.empty(2, 5, D, device="cuda"))
        assert found is not None
        assert (found.device.type, found.shape) == ("cuda", (2, D))
    assert torch.equal(pairs_of(traced, None, D, angles(D)[0]), expected)


@pytest.mark.parametrize(
    ("name", "stretch"), [("llava", 1.0), ("llava", 1.7), ("glm4v", 1.0), ("glm4v", 1.7)]
)
def test_the_operator_and_the_models_own_function_agree(
    name: str, stretch: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only some channels turn and cos and sin are longer than 1, as YaRN makes them."""
    text = find_parts(build_or_skip(name)).text
    text.rotary_emb.attention_scaling = stretch
    attention = next(module for module in text.layers[0].modules() if hasattr(module, "k_proj"))
    query, key = torch.randn(2, 4, 5, attention.head_dim), torch.randn(2, 2, 5, attention.head_dim)
    position = torch.arange(10).view(2, 5)
    axes = getattr(text.config, "rope_parameters", None) or getattr(text.config, "rope_scaling", None) or {}
    position = position.expand(3, -1, -1) if "mrope_section" in axes else position
    cos, sin = text.rotary_emb(query, position)
    rotation, sections = unrotation.rotation_with(attention)
    given = rotate(rotation, sections, query, key, cos, sin)
    found = unrotation.unrotated(attention, text, (cos, sin), *given)
    monkeypatch.setattr(unrotation, "pairs_of", lambda *arguments: None)
    by_function = unrotation.unrotated(attention, text, (cos, sin), *given)
    for one, other, before in zip(found, by_function, (query, key), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(one, before, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "glm"])
def test_in_half_precision_the_operator_rounds_once(name: str) -> None:
    """The model's own function rounds each product and their sum: it is never nearer to what was rotated."""
    cos, sin = (each.bfloat16() for each in angles(MODELS[name]))
    rotation = function_of(name)
    pairs = pairs_of(rotation, None, D, cos)
    assert pairs is not None
    vectors = torch.randn(2, 4, 5, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = rotate(rotation, None, vectors.double(), vectors.double(), cos.double(), -sin.double())[0]
    own = rotate(rotation, None, vectors, vectors, cos, -sin)[0]
    (found, _) = gap_kernels.unrotate(vectors, vectors, cos, sin, pairs)
    errors = [(each.double() - exact).abs() for each in (found, own)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].max() < errors[1].max()
