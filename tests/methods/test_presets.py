"""Presets: the published numbers, budgets in between, and refusals."""

from __future__ import annotations

import inspect
import math
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
from support.tiny import build as tiny_build

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.integration.stages import fitted
from gap_triton.integration.supported_models import find_parts
from gap_triton.presets import PRESETS
from gap_triton.presets.depth import pruning_layers
from gap_triton.strategies.by_features import BY_FEATURES
from gap_triton.vision.budget import budget_of
from gap_triton.vision.layout import Layout, View


def stages(name: str, **options: object) -> list[tuple[float | int | str, int]]:
    return [(stage.keep, stage.layer) for stage in GapConfig.preset(name, **options).stages]


def survivors(config: GapConfig, tokens: int, newlines: int = 0) -> list[int]:
    """How many visual tokens each stage leaves, of one image of so many, newlines included."""
    left, counts = tokens, []
    for stage in config.stages:
        left = stage.count(tokens, left)
        counts.append(left)
    return counts


@pytest.mark.parametrize(
    ("budget", "expected"),
    # Averages of 64, 128, 192 tokens on LLaVA-1.5; stage 2 on entering layer 16 of 32.
    [(64, [112, 16]), (128, [224, 32]), (192, [336, 48])],
)
def test_nuwa_on_llava_is_as_published(budget: int, expected: list[int]) -> None:
    config = GapConfig.preset("nuwa", budget=budget)
    assert survivors(config, 576) == expected
    assert [stage.layer for stage in config.stages] == [-1, 15]
    first = config.stages[0]
    assert (first.score, first.coverage, first.merge) == ("cls", "region", "aggregation")
    assert first.per_region is None  # which is 1, 2, 3 of 144 regions
    assert -(-expected[0] // 144) == {64: 1, 128: 2, 192: 3}[budget]


@pytest.mark.parametrize(
    ("budget", "tokens", "expected", "candidates"),
    # Stage 2 scores in layer 14 of 28, 0-based, and keeps the floor of a share of what is left. 256 tokens: 37, 101, 152.
    [(0.25, 256, [90, 37], 3), (0.5, 256, [154, 101], 3), (0.75, 256, [218, 152], 4)],
)
def test_nuwa_on_qwen_is_as_published(
    budget: float, tokens: int, expected: list[int], candidates: int
) -> None:
    config = GapConfig.preset("nuwa", budget=budget, layers=28)
    assert survivors(config, tokens) == expected
    assert [stage.layer for stage in config.stages] == [-1, 14]
    first = config.stages[0]
    regions = tokens // 4
    assert (first.per_region or -(-expected[0] // regions)) == candidates


def of_next(height: int, width: int, tiles: int) -> Layout:
    """An image of LLaVA-NeXT: an overview of 24 x 24, and the details with a newline after each row."""
    numbers, details = np.arange(576), np.arange(height * width)
    views = (
        View(0, 0, numbers, (24, 24), numbers),
        View(0, 0, 576 + details + details // width, (height, width), 576 + details),
    )
    assert -(-height // 24) * -(-width // 24) == tiles
    return Layout((576 + height * (width + 1),), views)


@pytest.mark.parametrize(
    ("budget", "each", "second", "candidates"),
    # Published are 290 / 33, 582 / 62, 1162 / 120. Of these 58, 116, 232 are of each of five tiles; 48 newlines come to
    # them, and of all together a tenth is left.
    [(160, 290 // 5, 33, 2), (320, 582 // 5, 62, 3), (640, 1162 // 5, 120, 3)],
)
def test_nuwa_on_next_is_as_published(budget: int, each: int, second: int, candidates: int) -> None:
    config = GapConfig.preset("nuwa", budget=budget)
    first, last = config.stages
    assert first.per_region == candidates
    layout = of_next(48, 48, 4)
    kept = budget_of(layout, first, None)
    assert (kept.views, kept.newlines) == ((each, 4 * each), (48,))
    assert last.count(layout.counts[0], 5 * each + 48) == second
    assert [stage.layer for stage in config.stages] == [-1, 15]
    # As many of each tile also where padding was cut off the details, or there are two tiles.
    cropped = budget_of(of_next(36, 48, 4), first, None)
    assert (cropped.views, cropped.newlines) == ((each, 4 * each), (36,))
    two = budget_of(of_next(24, 48, 2), first, None)
    total = {160: 290, 320: 582, 640: 1162}[budget]
    assert (two.views, two.newlines) == ((total // 3, 2 * (total // 3)), (24,))
    # Where a tile has not as many, all stay.
    tiny = budget_of(of_next(24, 2, 1), first, None)
    assert tiny.views == (min(total // 2, 576), min(total // 2, 48))


def test_nuwa_asks_the_model_for_tiles() -> None:
    assert GapConfig.preset("nuwa", budget=100, tiles=True).budget_by == "tiles"
    assert GapConfig.preset("nuwa", budget=160, tiles=False).budget_by == "tokens"
    assert GapConfig.preset("nuwa", budget=160, model=ways.build("llava")).budget_by == "tokens"
    following = GapConfig.preset("nuwa", budget=100, model=tiny_build("llava_next"))
    assert (following.budget_by, following.keep, following.per_region) == ("tiles", round(1.815 * 100), 2)


def test_schedules_are_as_published() -> None:
    assert stages("pyramiddrop") == [(0.5, 7), (0.25, 15), (0.125, 23)]
    assert stages("fastv") == [(0.5, 1)]


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        ("sparsevlm", 192, (300, 200, 110)),
        ("sparsevlm", 128, (303, 110, 36)),
        ("sparsevlm", 96, (238, 48, 26)),
        ("sparsevlm", 64, (66, 30, 17)),
        # USE_VERSION=2_0
        ("sparsevlm+", 192, (300, 200, 118)),
        ("sparsevlm+", 128, (238, 108, 60)),
        ("sparsevlm+", 96, (246, 54, 28)),
        ("sparsevlm+", 64, (66, 34, 20)),
    ],
)
def test_sparsevlm_is_as_published(name: str, budget: int, expected: tuple[int, ...]) -> None:
    config = GapConfig.preset(name, budget=budget)
    assert [(stage.keep, stage.layer) for stage in config.stages] == list(
        zip(expected, (2, 6, 15), strict=True)
    )
    score = {"sparsevlm": "raters", "sparsevlm+": "raters_corrected"}[name]
    assert {stage.score for stage in config.stages} == {score}
    assert config.ids == "kept"
    assert GapConfig.preset(name, budget=budget / 576).stages == tuple(
        Stage(round(count / 576, 6), layer, score) for count, layer in zip(expected, (2, 6, 15), strict=True)
    )


def test_feather_is_as_published() -> None:
    """R = 30%: the best and a lattice of stride 3 together, then R squared of these: topk(int(n * ratio * ratio))."""
    config = GapConfig.preset("feather")
    lattice = 8 * 8
    together = lattice + (576 - lattice) * Fraction(3, 10)
    assert survivors(config, 576) == [math.ceil(together), 19] == [218, 19]
    assert [stage.layer for stage in config.stages] == [7, 15]
    assert {stage.score for stage in config.stages} == {"unrotated"}
    first, second = config.stages
    assert int(first.spread * 218) == lattice
    assert (second.keep, second.share_of) == (0.09, "left")


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_feather_finds_its_ratio(ratio: float) -> None:
    together = 1 / 9 + 8 / 9 * ratio
    first, second = GapConfig.preset("feather", budget=together * ratio**2).stages
    assert first.keep == pytest.approx(together, abs=1e-5)
    assert second.keep == pytest.approx(ratio**2, abs=1e-5)


def test_prumerge_plus_spreads_three_for_each_outlier() -> None:
    """82 outliers of 576 make a stride of int(int(576 / 82) / 3) = 2, of which 250 tokens are not among the outliers."""
    config = GapConfig.preset("prumerge+", budget=82 + 250)
    assert int(config.spread * config.keep) == pytest.approx(250, abs=1)


@pytest.mark.parametrize(
    ("name", "budget", "count"),
    [
        ("divprune", 0.098, 57),  # the code rounds 56.4 to the nearest
        *(("cdpruner", count, count) for count in (64, 128, 192)),
        *(("scope", count, count) for count in (64, 128, 192)),
        ("fastervlm", 0.5, 288), ("fastervlm", 0.25, 144), ("fastervlm", 0.1, 58), ("fastervlm", 0.05, 29),
        *(("vispruner", count, count) for count in (32, 64, 128)),
        *(("hiprune", count, count) for count in (64, 128, 192)),
        *(("dart", count, count) for count in (64, 128, 192)),
    ],
)  # fmt: skip
def test_counts_are_as_published(name: str, budget: float | int, count: int) -> None:
    (stage,) = GapConfig.preset(name, budget=budget).stages
    assert stage.count(576) == count
    assert stage.layer == (1 if name == "dart" else -1)


@pytest.mark.parametrize(
    ("budget", "layers", "expected"),
    [
        # The released example on LLaVA-1.5, a mean of 64; on Qwen2.5-VL a third of 0.167, and 0.67 of 0.6.
        (64, 32, [(96, -1), (32, 15)]),
        (0.111, 28, [(pytest.approx(0.167, abs=1e-3), -1), (pytest.approx(0.0556, abs=1e-3), 13)]),
        (0.5, 28, [(0.6, -1), (pytest.approx(0.402, abs=3e-3), 13)]),
    ],
)
def test_vscan_is_as_published(budget: float | int, layers: int, expected: list[tuple[float, int]]) -> None:
    assert stages("vscan", budget=budget, layers=layers) == expected
    first = GapConfig.preset("vscan", budget=budget).stages[0]
    assert (first.score, first.coverage, first.merge) == ("cls", "windows", "cluster")


def test_coverages_are_as_published() -> None:
    found = {name: GapConfig.preset(name).stages[0] for name in PRESETS}
    known = (*BY_FEATURES, "anchors")
    assert {name: (stage.score, stage.coverage) for name, stage in found.items() if stage.coverage in known} == {
        "divprune": ("random", "max_min"),
        "cdpruner": ("text_similarity", "determinant"),
        "scope": ("cls", "coverage_gain"),
        "vispruner": ("cls", "distinct"),
        "dart": ("key_norm", "least_similar"),
        "hiprune": ("received", "anchors"),
    }  # fmt: skip
    assert GapConfig.preset("fastervlm", budget=0.1) == GapConfig.preset("cls", budget=0.1)
    assert found["divprune"].keep == 0.098


@pytest.mark.parametrize(("budget", "mean"), [(0.1414, 192), (0.0448, 128)])
def test_swiftvlm_means_what_is_published(budget: float, mean: int) -> None:
    """In layers 3, 11 and 15 of 32, counted from 1; the budgets of the paper are means over the layers."""
    chosen = GapConfig.preset("swiftvlm", budget=budget).stages
    assert [stage.layer + 1 for stage in chosen] == [3, 11, 15]
    held = [576] * 32
    for stage in chosen:
        held[stage.layer + 1 :] = [stage.count(576)] * (31 - stage.layer)
    assert abs(sum(held) / 32 - mean) < 1


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
    for tokens in (1, 64, 576):
        counts = survivors(config, tokens)
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] >= 1
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
        ("sparsevlm", {"budget": 100}, r"budget=100: expected 64, 96, 128, 192, or a share"),
        ("nuwa", {"budget": 0}, r"budget=0: expected a share"),
        ("nuwa", {"tiles": 1}, r"tiles=1: expected True, False or None"),
        ("sparsevlm+", {"budget": 576}, r"budget=576: expected 64, 96, 128, 192, or a share"),
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
    if name not in ("pyramiddrop", "feather", "swiftvlm"):
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
            assert stage.count(576, 1) == 1


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "sparsevlm+", "feather", "fastv", "swiftvlm"])
def test_the_smallest_share_keeps_a_token_in_every_stage(name: str) -> None:
    assert survivors(GapConfig.preset(name, budget=1e-300), 576)[-1] == 1


@pytest.mark.parametrize("name", PRESETS)
def test_docstrings_say_where_it_comes_from_and_what_the_budget_is(name: str) -> None:
    function = PRESETS[name]
    assert "arXiv" in inspect.getmodule(function).__doc__
    assert "budget:" in function.__doc__


@pytest.mark.parametrize("name", ["cls", "prumerge", "prumerge+", "visionzip", "nuwa", "scope", "vscan"])
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
    nuwa = GapConfig.preset("nuwa", budget=0.5, model=hybrid)  # before the decoder and half-way through it
    assert ([stage.layer for stage in nuwa.stages], nuwa.score) == ([-1, 3], "received")
    three = GapConfig(
        0.8, -1, "random", then=(Stage(0.6, 1, "text"), Stage(0.5, 2, "text"), Stage(0.4, 3, "text"))
    )
    with pytest.raises(ValueError, match=r"at layers from 1, 2, 3 on: .* At layer 1, 3 it can"):
        fitted(three, find_parts(hybrid))
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
    told = {"layers": LAYERS, "score": score, "tiles": False}
    return PRESETS[name](**{key: value for key, value in told.items() if key in known})
