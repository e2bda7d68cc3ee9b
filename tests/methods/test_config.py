"""GapConfig validates on construction, and counts exactly."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gap_triton import GapConfig, Stage
from gap_triton.config import Ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"GapConfig.keep=0.0: expected a float in \(0, 1\]"),
        ({"keep": 1.5}, r"GapConfig.keep=1.5: expected a float in \(0, 1\]"),
        ({"keep": float("nan")}, r"GapConfig.keep=nan: expected a float in \(0, 1\]"),
        ({"keep": 0}, r"GapConfig.keep=0: an int counts the tokens kept and must be >= 1"),
        ({"keep": -3}, r"GapConfig.keep=-3: an int counts"),
        ({"keep": True}, r"GapConfig.keep=True: expected a float"),
        ({"keep": "half"}, r"GapConfig.keep='half': expected a float"),
        ({"layer": -2}, r"GapConfig.layer=-2: expected a decoder layer"),
        ({"layer": 1.0}, r"GapConfig.layer=1.0: expected a decoder layer"),
        ({"keep": "outliers"}, r"GapConfig.keep='outliers': .* use layer=-1"),
        ({"keep": "outliers", "layer": -1, "score": "random"}, r"GapConfig.keep='outliers': .* such a score"),
        ({"score": "norm"}, r"GapConfig.score='norm': expected one of 'last_token', 'text', 'raters'"),
        (
            {"score": "cls"},
            r"GapConfig.score='cls' with layer=2: in a decoder layer it is one of 'last_token'",
        ),
        ({"exponent": -1.0}, r"GapConfig.exponent=-1.0: expected a finite number >= 0"),
        ({"exponent": True}, r"GapConfig.exponent=True: expected a finite number >= 0"),
        (
            {"exponent": float("nan"), "coverage": "determinant"},
            r"GapConfig.exponent=nan: expected a finite number",
        ),
        (
            {"exponent": 2.0},
            r"GapConfig.exponent=2.0 with coverage='topk': only coverage='determinant' or 'coverage_gain' takes",
        ),
        ({"coverage": "grid"}, r"GapConfig.coverage='grid': expected one of 'topk', 'region', 'stride'"),
        ({"merge": "mean"}, r"GapConfig.merge='mean': expected one of 'none', 'aggregation'"),
        ({"merge": "average"}, r"GapConfig.merge='average': .* use layer=-1"),
        ({"then": Stage(layer=4)}, r"GapConfig.then=Stage\(.*expected a tuple of gap_triton.Stage"),
        ({"then": (GapConfig(layer=4),)}, r"GapConfig.then=.*: expected a tuple of gap_triton.Stage"),
        ({"then": (Stage(layer=2),)}, r"GapConfig.then=.*: layers must increase, and 2 follows 2"),
        (
            {"then": (Stage(0.6, 4),)},
            r"GapConfig.then=.*can't keep more than the one before, and keep=0.6 follows 0.5",
        ),
        ({"then": (Stage(0.2, 4),), "ids": "permuted"}, r"GapConfig.ids='permuted': .* use 'compacted'"),
        ({"then": None}, r"GapConfig.then=None: expected a tuple of gap_triton.Stage"),
        ({"then": 3}, r"GapConfig.then=3: expected a tuple of gap_triton.Stage"),
        ({"then": "ab"}, r"GapConfig.then=\('a', 'b'\): expected a tuple of gap_triton.Stage"),
        ({"then": (x for x in (1, 2))}, r"GapConfig.then=\(1, 2\): expected a tuple of gap_triton.Stage"),
        ({"keep": -(10**5000)}, r"GapConfig.keep=<int>: an int counts"),
        ({"layer": -(10**5000)}, r"GapConfig.layer=<int>: expected a decoder layer"),
        ({"keep": np.array([0.5, 1.0])}, r"GapConfig.keep=array\(\[0.5, 1. \]\): expected a float"),
        ({"keep": Fraction(1, 4)}, r"GapConfig.keep=Fraction\(1, 4\): expected a float"),
        ({"ids": "shifted"}, r"GapConfig.ids='shifted': expected one of 'kept', 'compacted', 'permuted'"),
        ({"seed": None}, r"GapConfig.seed=None: expected an int"),
        ({"seed": 2**64}, r"GapConfig.seed=18446744073709551616: expected an int in 0..2\*\*63 - 1"),
        ({"score": np.array(["text"])}, r"GapConfig.score=array.*: expected one of"),
        (
            {"layer": -1},
            r"GapConfig.score='text' with layer=-1: after the vision encoder .* is one of 'cls'",
        ),
    ],
)
def test_bad_values_name_field_value_and_what_is_allowed(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GapConfig(**options)


def test_a_stage_is_checked_like_the_first() -> None:
    with pytest.raises(ValueError, match=r"Stage.keep=0.0: expected a float in \(0, 1\]"):
        Stage(keep=0.0)


def test_outliers_have_no_number() -> None:
    with pytest.raises(ValueError, match=r"keep='outliers': how many tokens that is depends on their scores"):
        Stage("outliers", -1, "cls").count(576)


def test_stages_are_in_order() -> None:
    config = GapConfig(0.5, -1, "cls", "region", "aggregation", then=[Stage(0.25, 2, "text"), Stage(3, 9)])
    assert config.stages == (
        Stage(0.5, -1, "cls", "region", "aggregation"), Stage(0.25, 2, "text"), Stage(3, 9)
    )  # fmt: skip
    assert GapConfig().stages == (Stage(),)


def test_stages_from_a_generator_are_all_there() -> None:
    stages = (Stage(0.25, 2), Stage(0.1, 4))
    expected = GapConfig(0.5, 0, then=stages)
    assert expected.stages[1:] == stages
    assert GapConfig(0.5, 0, then=(stage for stage in stages)) == expected
    assert GapConfig(0.5, 0, then=iter(stages)) == expected
    assert GapConfig(0.5, 0, then=map(Stage, (0.25, 0.1), (2, 4))) == expected


def test_numpy_values_become_plain_ones() -> None:
    odd = GapConfig(
        np.array(0.5),
        np.array(-1),
        np.str_("cls"),
        np.str_("region"),
        np.str_("none"),
        np.str_("kept"),
        np.uint16(3),
    )
    plain = GapConfig(0.5, -1, "cls", "region", "none", "kept", 3)
    assert odd == plain
    assert [type(value) for value in vars(odd).values()] == [type(value) for value in vars(plain).values()]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.fractions(),
    st.text(max_size=9),
    st.sampled_from(
        ["cls", "text", "region", "average", "outliers", "compacted", np.str_("random"), -1, 10**400]
    ),
    st.sampled_from(
        [np.array(1), np.array([1.0]), np.float16(0.1), np.int8(3), np.bool_(True), torch.ones(2), Stage()]
    ),
    st.lists(st.sampled_from([Stage(0.1, 4), Stage(1, 9), 3]), max_size=3).map(iter),
)


@given(options=st.dictionaries(st.sampled_from(sorted(vars(GapConfig()))), ODD, min_size=1))
def test_odd_values_are_a_configuration_or_a_sentence(options: dict[str, object]) -> None:
    """Never an error from below, and nothing that goes on to be used up."""
    refusal, config = None, None
    try:
        config = GapConfig(**options)
    except ValueError as error:
        refusal = str(error)
    if config is None:
        assert refusal.startswith(tuple(f"GapConfig.{field}=" for field in vars(GapConfig())))
        return
    assert GapConfig(**vars(config)) == config
    assert hash(config) == hash(GapConfig(**vars(config)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_region": 0, "coverage": "region"}, "per_region=0: expected an int >= 1, or None"),
        ({"per_region": 2.0, "coverage": "region"}, "per_region=2.0: expected an int >= 1, or None"),
        ({"per_region": 2}, "per_region=2: only coverage='region' has candidates; leave it out"),
        ({"spread": 1.5, "coverage": "stride"}, r"spread=1.5: expected a float in \[0, 1\], or None"),
        ({"spread": math.nan, "coverage": "stride"}, r"spread=nan: expected a float in \[0, 1\], or None"),
        ({"spread": 0.5}, "spread=0.5: only coverage='stride' spreads a part evenly; leave it out"),
        ({"share_of": "all"}, "share_of='all': expected one of 'prompt', 'left'"),
        ({"share_of": "left"}, "share_of='left': nothing is left before the first stage but the prompt"),
        ({"share_of": "left", "keep": 3}, "share_of='left': only a share is one of something"),
        ({"budget_by": "views"}, "budget_by='views': expected one of 'tokens', 'tiles'"),
        ({"budget_by": "tiles"}, "budget_by='tiles': tiles share a number after the vision encoder; use layer=-1"),
        ({"budget_by": "tiles", "layer": -1, "score": "cls", "keep": "outliers"}, "budget_by='tiles': tiles share"),
        ({"ids": "reordered", "then": (Stage(0.1, 4),)}, "ids='reordered': score order is defined for one stage"),
    ],
)  # fmt: skip
def test_options_of_a_stage_are_refused_where_they_say_nothing(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"GapConfig.{message}"):
        GapConfig(**options)


def test_options_of_a_stage_are_taken_as_plain_values() -> None:
    config = GapConfig(0.5, -1, "cls", "stride", spread=np.float64(0.25), budget_by=np.str_("tiles"))
    assert (config.spread, config.budget_by) == (0.25, "tiles")
    assert GapConfig(0.5, 1, coverage="stride", spread=1).spread == 1.0
    assert GapConfig(0.5, 1, coverage="region", per_region=np.int8(2)).per_region == 2
    assert config.stages == (Stage(0.5, -1, "cls", "stride", spread=0.25, budget_by="tiles"),)


@pytest.mark.parametrize(
    ("keep", "tokens", "left", "expected"),
    [
        (0.42, 256, 90, 37), (0.66, 256, 154, 101), (0.7, 256, 218, 152), (0.09, 576, 218, 19), (0.1, 2928, 338, 33),
        (0.7, 99, 10, 7), (0.1, 99, 30, 3), (1e-6, 576, 576, 1), (0.5, 10, 1, 1), (0.5, 10, 0, 0), (1.0, 576, 218, 218),
    ],
)  # fmt: skip
def test_a_share_of_what_is_left_is_rounded_down(keep: float, tokens: int, left: int, expected: int) -> None:
    assert Stage(keep, 2, share_of="left").count(tokens, left) == expected
    assert Stage(keep, 2).count(tokens, left) == min(Stage(keep, 2).count(tokens), left)


def test_keep_everything_is_no_pruning_with_kept_ids_only() -> None:
    assert GapConfig(1.0).changes_nothing
    assert GapConfig(1.0, then=(Stage(1.0, 4),)).changes_nothing
    assert not GapConfig(1.0, then=(Stage(0.5, 4),)).changes_nothing
    assert not GapConfig(10**6).changes_nothing
    assert not any(GapConfig(1.0, ids=ids).changes_nothing for ids in get_args(Ids) if ids != "kept")


def test_unknown_field() -> None:
    with pytest.raises(TypeError, match="kept"):
        GapConfig(kept=0.5)


@pytest.mark.parametrize(
    ("keep", "tokens", "expected"),
    [
        (0.7, 10, 7),  # 0.7 * 10 is 7.000000000000001 in binary
        (0.1, 30, 3),
        (0.25, 577, 145),
        (0.5, 1, 1),
        (1.0, 0, 0),
        (0.5, 0, 0),
        (1e-9, 576, 1),
        (1.0, 576, 576),
        (64, 576, 64),
        (64, 10, 10),
        (1, 576, 1),
        (np.float32(0.1), 10, 1),
        (np.int64(3), 10, 3),
    ],
)
def test_count(keep: float | int, tokens: int, expected: int) -> None:
    assert GapConfig(keep=keep).count(tokens) == expected


@given(st.floats(1e-12, 1.0), st.integers(0, 100_000))
def test_a_share_is_the_decimal_that_it_prints_as(keep: float, tokens: int) -> None:
    assert GapConfig(keep=keep).count(tokens) == math.ceil(Fraction(repr(keep)) * tokens)


def test_is_frozen_and_hashable() -> None:
    config = GapConfig()
    with pytest.raises(AttributeError):
        config.keep = 0.1
    assert hash(config) == hash(GapConfig())
