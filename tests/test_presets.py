"""Presets: the published numbers, budgets in between, and refusals."""

from __future__ import annotations

import inspect

import pytest
import torch
import ways
from methods import preset as for_model
from tiny import LAYERS

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.presets import PRESETS
from gap_triton.presets.depth import pruning_layers


def stages(name: str, **options: object) -> list[tuple[float | int | str, int]]:
    return [(stage.keep, stage.layer) for stage in GapConfig.preset(name, **options).stages]


@pytest.mark.parametrize(
    ("budget", "layers", "expected"),
    [
        # Averages of 64, 128, 192 tokens on LLaVA-1.5; stage 2 on entering layer 16 of 32.
        (64, 32, [(112, -1), (16, 15)]),
        (128, 32, [(224, -1), (32, 15)]),
        (192, 32, [(336, -1), (48, 15)]),
        # Qwen2.5-VL, 28 layers: shares of stage 1, and of that for stage 2 after layer 13, 0-based.
        (0.25, 28, [(0.35, -1), (0.147, 13)]),
        (0.5, 28, [(0.6, -1), (0.396, 13)]),
        (0.75, 28, [(0.85, -1), (0.595, 13)]),
    ],
)
def test_nuwa_is_as_published(budget: float | int, layers: int, expected: list[tuple[float, int]]) -> None:
    assert stages("nuwa", budget=budget, layers=layers) == expected
    first = GapConfig.preset("nuwa", budget=budget).stages[0]
    assert (first.score, first.coverage, first.merge) == ("cls", "region", "aggregation")


@pytest.mark.parametrize("tokens", [160, 320, 640])
def test_nuwa_on_next_is_near_what_is_published(tokens: int) -> None:
    """Published: 290 / 582 / 1162 and about 10% of that."""
    (first, _), (second, _) = stages("nuwa", budget=tokens)
    assert abs(first - {160: 290, 320: 582, 640: 1162}[tokens]) <= 0.04 * first
    assert 0.1 <= second / first <= 0.15


def test_schedules_are_as_published() -> None:
    assert stages("pyramiddrop") == [(0.5, 7), (0.25, 15), (0.125, 23)]
    assert stages("sparsevlm", budget=192) == [(300, 2), (200, 6), (110, 15)]
    assert stages("sparsevlm", budget=128) == [(303, 2), (110, 6), (36, 15)]
    assert stages("sparsevlm", budget=64) == [(66, 2), (30, 6), (17, 15)]
    assert stages("fastv") == [(0.5, 1)]
    # 30% and a ninth of the others; then 30% of those.
    assert stages("feather") == [(pytest.approx(17 / 45, abs=1e-3), 7), (pytest.approx(0.1133, abs=1e-4), 15)]


def test_sparsevlm_between_the_published_budgets() -> None:
    assert stages("sparsevlm", budget=192 / 576) == [
        (round(count / 576, 6), layer) for count, layer in ((300, 2), (200, 6), (110, 15))
    ]
    halfway = GapConfig.preset("sparsevlm", budget=160 / 576).stages
    assert [stage.keep for stage in halfway] == [
        pytest.approx(count / 576, abs=1e-6) for count in (301.5, 155, 73)
    ]
    assert stages("sparsevlm", budget=1.0) == [(1.0, 2), (1.0, 6), (1.0, 15)]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("share", [0.03, 0.125, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0])
def test_any_share_is_a_configuration(name: str, share: float) -> None:
    config = for_model(name, 6, cls=True, budget=share)
    keeps = [stage.keep for stage in config.stages]
    assert keeps == sorted(keeps, reverse=True)
    assert config.ids == "kept"


@pytest.mark.parametrize("entered", [(2,), (16,), (8, 16, 24), (3, 7, 16)])
@pytest.mark.parametrize("layers", [4, 5, 6, 28, 32, 80])
def test_layers_scale_with_the_depth(entered: tuple[int, ...], layers: int) -> None:
    found = pruning_layers(entered, layers)
    assert list(found) == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] <= layers - 2
    if layers == 32:
        assert found == tuple(layer - 1 for layer in entered)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nuva", {}, r"preset 'nuva': expected one of 'prumerge', 'prumerge\+', .*'nuwa'"),
        ("cls", {"layers": 6}, r"preset 'cls' takes no 'layers': it takes 'budget', 'score'"),
        ("fastv", {"layers": 1}, r"layers=1: expected the number of decoder layers, an int > 1"),
        ("pyramiddrop", {"layers": 3}, r"layers=3: expected the number of decoder layers, an int > 3"),
        (
            "pyramiddrop",
            {"budget": 64},
            r"budget=64: expected a share of the visual tokens, a float in \(0, 1\]",
        ),
        ("feather", {"budget": 0.0}, r"budget=0.0: expected a share"),
        ("sparsevlm", {"budget": 100}, r"budget=100: expected 64, 128, 192, or a share"),
        ("nuwa", {"budget": 0}, r"budget=0: expected a share"),
        ("nuwa", {"budget": True}, r"budget=True: expected a share"),
        ("cls", {"budget": 2.0}, r"GapConfig.keep=2.0: expected a float in \(0, 1\]"),
    ],
)
def test_refusals_name_what_is_allowed(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GapConfig.preset(name, **options)


@pytest.mark.parametrize("name", PRESETS)
def test_docstrings_say_where_it_comes_from_and_what_the_budget_is(name: str) -> None:
    function = PRESETS[name]
    assert "arXiv" in inspect.getmodule(function).__doc__
    assert "budget:" in function.__doc__


@pytest.mark.parametrize("name", ["cls", "prumerge", "prumerge+", "visionzip", "nuwa"])
def test_without_a_cls_token_the_refusal_names_what_runs(name: str) -> None:
    model = ways.build(ways.MROPE, "gap_triton")
    with pytest.raises(ValueError, match=r"no CLS token.*score='received'"):
        gap_triton.configure(model, for_model(name, LAYERS, cls=True))
    gap_triton.configure(model, for_model(name, LAYERS, cls=False))


def test_a_refused_configuration_changes_nothing() -> None:
    model = ways.build(ways.MROPE, "gap_triton")
    gap_triton.configure(model, GapConfig(0.4, 1))
    with pytest.raises(ValueError, match="no CLS token"):
        gap_triton.configure(model, GapConfig.preset("cls"))
    inputs = ways.make(ways.MROPE, "even")
    with torch.no_grad():
        model(**inputs)
    assert gap_triton.last_selection(model).visual_index.shape[1] == 15
    unpruned = ways.build(ways.MROPE, "sdpa")
    with pytest.raises(ValueError, match="no CLS token"):
        gap_triton.attach(unpruned, GapConfig.preset("cls"))
    assert unpruned.model.language_model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(unpruned(**inputs).logits, ways.build(ways.MROPE, "sdpa")(**inputs).logits)


def test_a_composed_method_needs_no_preset() -> None:
    assert GapConfig.preset("nuwa", budget=64) == GapConfig(
        112, -1, "cls", "region", "aggregation", then=(Stage(16, 15, "last_token"),)
    )


def test_a_model_tells_its_depth_and_whether_it_has_a_cls_token() -> None:
    llava, qwen = ways.build("llava"), ways.build(ways.MROPE)
    for name in PRESETS:
        assert GapConfig.preset(name, model=llava) == for_model_defaults(name, "cls")
        assert GapConfig.preset(name, model=qwen) == for_model_defaults(name, "received")
    assert GapConfig.preset("cls", model=qwen, score="cls").score == "cls"
    assert GapConfig.preset("fastv", model=qwen, layers=32).layer == 1


def for_model_defaults(name: str, score: str) -> GapConfig:
    known = inspect.signature(PRESETS[name]).parameters
    told = {"layers": LAYERS, "score": score}
    return PRESETS[name](**{key: value for key, value in told.items() if key in known})
