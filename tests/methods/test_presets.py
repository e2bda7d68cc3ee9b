"""Presets: the published numbers, budgets in between, and refusals."""

from __future__ import annotations

import inspect
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ways
from support.installed_types import build_or_skip
from support.methods import preset as for_model
from support.tiny import LAYERS

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
        ("cls", {"budget": 2.0}, r"budget=2.0: expected a share .*, a float in \(0, 1\], or their number"),
        ("trim", {"budget": "outlier"}, r"budget='outlier': expected a share, .* or 'outliers'"),
        ("cls", {"budget": "outliers"}, r"budget='outliers': expected a share"),
        ([], {}, r"preset \[\]: expected one of 'prumerge'"),
        (None, {}, r"preset None: expected one of 'prumerge'"),
        ("fastv", {"layers": -(10**5000)}, r"layers=<int>: expected the number of decoder layers"),
    ],
)
def test_refusals_name_what_is_allowed(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GapConfig.preset(name, **options)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, lambda x: np.array(x)])
def test_numpy_numbers_are_numbers(name: str, kind) -> None:
    options = {
        "layers": (np.int64(28), 28),
        "seed": (np.uint8(3), 3),
        "score": (np.str_("received"), "received"),
    }
    known = inspect.signature(PRESETS[name]).parameters
    odd = {option: odd for option, (odd, _) in options.items() if option in known}
    plain = {option: plain for option, (_, plain) in options.items() if option in known}
    assert GapConfig.preset(name, budget=kind(0.25), **odd) == GapConfig.preset(name, budget=0.25, **plain)
    if name not in ("pyramiddrop", "feather"):
        config = GapConfig.preset(name, budget=np.int32(64), **odd)
        assert config == GapConfig.preset(name, budget=64, **plain)
        assert type(config.keep) is int


ODD_NUMBERS = [
    None, True, np.bool_(True), 0, -1, 1, 64, 10**400, -(10**400), 10**5000, -(10**5000), 0.0, -0.0, 0.25, 1.0, 1.5,
    float("nan"), float("inf"), 5e-324, np.float32(0.1), np.float16("nan"), np.longdouble("1e-400"), np.int64(64),
    np.uint8(0),
    np.array(0.5), np.array(3), np.array([0.5]), np.array([]), np.array(None), np.timedelta64(3, "D"), np.datetime64("NaT"),
    Fraction(1, 4), 1j, "0.5", "outliers", np.str_("outliers"), "", b"x", [], [0.5], (1,), {}, {0.5}, torch.tensor(0.5),
    torch.tensor([1, 2]), Stage, Stage(), GapConfig, range(3), iter(()), (x for x in ()), object(), lambda: 1,
]  # fmt: skip
ODD = st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats() | st.text(max_size=3) | st.fractions()


@given(name=st.sampled_from(sorted(PRESETS)), values=st.tuples(ODD, ODD, ODD, ODD), data=st.data())
def test_odd_values_are_a_configuration_or_a_sentence(name: str, values: tuple[object, ...], data) -> None:
    known = list(inspect.signature(PRESETS[name]).parameters)
    given_ = data.draw(st.sets(st.sampled_from(known), min_size=1))
    options = {option: value for option, value in zip(known, values, strict=False) if option in given_}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refusal, config = None, None
        try:
            config = GapConfig.preset(name, **options)
        except ValueError as error:
            refusal = str(error)
    if config is None:
        assert any(f"{option}=" in refusal for option in options), refusal
        return
    for stage in config.stages:
        assert type(stage.keep) in (int, float) or stage.keep == "outliers"
        assert type(stage.layer) is int
        if stage.keep != "outliers":
            assert 1 <= stage.count(576) <= 576


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "feather", "fastv"])
def test_the_smallest_share_keeps_a_token_in_every_stage(name: str) -> None:
    assert [stage.count(576) for stage in GapConfig.preset(name, budget=1e-300).stages][-1] == 1


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


def test_a_preset_of_a_model_that_can_be_pruned_at_some_layers_only(
    warnings: pytest.LogCaptureFixture,
) -> None:
    hybrid = build_or_skip("qwen3_5")  # attention in layers 1 and 3
    config = GapConfig.preset("fastv", model=hybrid)
    assert (config.layer, config.score) == (1, "last_token")
    assert "moves the stages of" in warnings.text
    assert "from decoder layers 0 to 1, at which it can be pruned" in warnings.text
    assert [stage.layer for stage in GapConfig.preset("feather", model=hybrid).stages] == [1, 3]
    with pytest.raises(ValueError, match=r"at layers from .* on: .* At layer 1, 3 it can"):
        GapConfig.preset("pyramiddrop", model=hybrid)  # three stages
    with pytest.raises(ValueError, match=r"both before and in its decoder: .*presets 'text', 'trim'"):
        GapConfig.preset("nuwa", model=hybrid)
    assert GapConfig.preset("trim", model=hybrid) == GapConfig.preset("trim")


def test_a_preset_of_a_model_that_can_be_pruned_before_its_decoder_only() -> None:
    model = build_or_skip("llama4")
    with pytest.raises(
        ValueError, match=r"can't prune Llama4.* in its decoder: .*chunks.*presets 'text', 'trim', 'random'"
    ):
        GapConfig.preset("fastv", model=model)
    assert GapConfig.preset("random", model=model).layer == -1


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
