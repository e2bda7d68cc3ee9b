"""Coverages that compare tokens by their features, against loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import ways
from support.embeds import embeds_of_prompt
from support.naive.greedy import CLEAR
from support.naive.strategies import (
    chosen_distinct,
    chosen_greedily,
    chosen_least_similar,
    fill,
    ranked,
)
from support.tiny import Image, build, prompt
from torch import Tensor

import gap_triton
from gap_triton import GapConfig, Stage
from gap_triton.config import needs_text
from gap_triton.strategies import choose
from gap_triton.strategies.by_features import BY_FEATURES, GREEDY
from gap_triton.strategies.coverage import choose_on_grid

NAN, INF = math.nan, math.inf
APART = 1e-6
"""Cosines that differ by less may be in either order in float32."""
# Times a gain, a score that is hardly more than 0 or than another may be less than float32 can hold.
FINITE = st.one_of(st.just(0.0), st.floats(2**-60, 4, width=32), st.floats(-4, -(2**-60), width=32))
SCORE = st.one_of(st.sampled_from([0.0, 1.0, INF, -INF, NAN]), FINITE)
NAIVE: dict[str, Callable[[list[float], Tensor, int], list[int]]] = {
    "least_similar": chosen_least_similar,
    "distinct": chosen_distinct,
}


def rows_apart(data: st.DataObject, rows: int, channels: int = 6) -> Tensor:
    """[N, C] whose cosines are apart."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    features = torch.randn(rows, channels, generator=generator)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    row, column = torch.triu_indices(rows, rows, 1)
    cosines = (unit @ unit.T)[row, column].sort().values
    assume(len(cosines) < 2 or float((cosines[1:] - cosines[:-1]).min()) > APART)
    return features


def expected(
    coverage: str, scores: list[float], features: Tensor, keep: int, exponent: float = 1.0
) -> list[int]:
    if coverage in NAIVE:
        return NAIVE[coverage](scores, features.double(), keep)
    index, clear = chosen_greedily(coverage, scores, features, keep, exponent)
    assume(clear > CLEAR)
    return index


@pytest.mark.parametrize("coverage", BY_FEATURES)
@settings(deadline=None, max_examples=12)
@given(st.data())
def test_choice(coverage: str, data: st.DataObject) -> None:
    groups, rows = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 18))
    features = torch.stack([rows_apart(data, rows) for _ in range(groups)])
    row = st.lists(SCORE, min_size=rows, max_size=rows)
    listed = data.draw(st.lists(row, min_size=groups, max_size=groups))
    keep = data.draw(st.integers(0, rows))
    scores = torch.tensor(listed, dtype=torch.float32)
    copy = scores.clone()
    wanted = [sorted(expected(coverage, *pair, keep)) for pair in zip(listed, features, strict=True)]
    assert choose(scores, keep, coverage, features=features).tolist() == wanted
    assert choose(scores, keep, coverage, features=features, length=keep + 2).tolist() == [
        fill(each, keep + 2) for each in wanted
    ]
    assert choose_on_grid(scores, keep, coverage, (1, rows), features).tolist() == wanted
    assert torch.equal(scores.nan_to_num(), copy.nan_to_num())


@pytest.mark.parametrize("coverage", [each for each in BY_FEATURES if each != "distinct"])
@settings(deadline=None, max_examples=8)
@given(st.data())
def test_choice_on_samples_with_filler(coverage: str, data: st.DataObject) -> None:
    """Filler is never chosen and compared with nothing, whatever it holds."""
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=2, max_size=3))
    columns = max(lengths) + data.draw(st.integers(0, 2))
    keep = [data.draw(st.integers(0, length)) for length in lengths]
    listed = [data.draw(st.lists(FINITE, min_size=length, max_size=length)) for length in lengths]
    rows = [rows_apart(data, length) for length in lengths]
    odd = data.draw(st.sampled_from([0.0, NAN, INF, 1e30]))
    features, scores = torch.full((len(lengths), columns, 6), odd), torch.full((len(lengths), columns), -INF)
    for number, length in enumerate(lengths):
        features[number, :length], scores[number, :length] = rows[number], torch.tensor(listed[number])
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    index = choose(scores, torch.tensor(keep), coverage, features=features, mask=mask)
    wanted = [expected(coverage, *each) for each in zip(listed, rows, keep, strict=True)]
    assert index.tolist() == [fill(each, max(keep)) for each in wanted]


@pytest.mark.parametrize("coverage", ["determinant", "coverage_gain"])
@settings(deadline=None, max_examples=10)
@given(st.data())
def test_scores_to_a_power(coverage: str, data: st.DataObject) -> None:
    rows, exponent = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([0.0, 0.5, 2.0, 4.0]))
    features, keep = rows_apart(data, rows), data.draw(st.integers(0, rows))
    score = st.one_of(
        st.just(0.0), st.floats(2**-8, 4, width=32)
    )  # its power is no less than float32 can hold
    scores = data.draw(st.lists(score, min_size=rows, max_size=rows))
    wanted, clear = chosen_greedily(coverage, scores, features, keep, exponent)
    assume(clear > CLEAR)
    given_scores = torch.tensor([scores])
    found = choose(given_scores, keep, coverage, features=features[None], exponent=exponent)
    assert found.tolist() == [wanted]
    assert choose_on_grid(
        given_scores, keep, coverage, (1, rows), features[None], exponent=exponent
    ).tolist() == [wanted]


def test_by_hand() -> None:
    """Two pairs of duplicates and one that is like none."""
    features = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]])
    scores = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1]])
    assert choose(scores, 3, "max_min", features=features).tolist() == [[0, 2, 4]]
    assert choose(scores, 3, "determinant", features=features).tolist() == [[0, 2, 4]]
    assert choose(scores, 3, "coverage_gain", features=features).tolist() == [[0, 2, 4]]
    # The first two by score; 2 and 4 are compared with 3, and 2 is like it.
    assert choose(scores, 4, "distinct", features=features).tolist() == [[0, 1, 3, 4]]
    # The first four are pivots: to be kept are as many as there are, or all.
    assert choose(scores, 3, "least_similar", features=features).tolist() == [[0, 1, 2]]
    # What is left goes to the last pivot: 4 and 5 are equally unlike 3, 0 and 1 are opposite to 5.
    six = torch.cat([features, -features[:, :1]], dim=1)
    more = torch.cat([scores, torch.zeros(1, 1)], dim=1)
    assert choose(more, 5, "least_similar", features=six).tolist() == [[0, 1, 2, 3, 4]]
    assert choose(more.flip(1), 5, "least_similar", features=six).tolist() == [[0, 2, 3, 4, 5]]


def test_a_score_that_may_be_negative_ranks_too() -> None:
    """Moved, so that the least is 0; the same as by the score that was moved."""
    generator = torch.Generator().manual_seed(0)
    features, scores = torch.randn(2, 30, 8, generator=generator), torch.rand(2, 30, generator=generator)
    scores -= scores.amin(1, keepdim=True)
    for coverage in GREEDY:
        found = choose(scores - 0.5, 9, coverage, features=features)
        assert torch.equal(found, choose(scores, 9, coverage, features=features))


@pytest.mark.parametrize("coverage", BY_FEATURES)
def test_a_token_that_is_spoiled_changes_no_other_row(coverage: str) -> None:
    generator = torch.Generator().manual_seed(1)
    features, scores = torch.randn(2, 20, 8, generator=generator), torch.rand(2, 20, generator=generator)
    expected_index = choose(scores, 7, coverage, features=features)[1]
    for value in (NAN, INF):
        spoiled = features.clone()
        spoiled[0, 3] = value
        found = choose(scores, 7, coverage, features=spoiled)
        assert torch.equal(found[1], expected_index)
        assert sorted(set(found[0].tolist())) == found[0].tolist()
        if coverage in GREEDY:
            assert 3 not in found[0]


FEATURES, SCORES = torch.randn(2, 6, 4), torch.rand(2, 6)


@pytest.mark.parametrize(
    ("given_arguments", "options", "message"),
    [
        ((SCORES, 2, "max_min"), {}, r"features: coverage='max_min' compares tokens by their features, .* got None"),
        ((SCORES, 2, "distinct"), {"features": FEATURES[:, 1:]}, r"features: expected \[B, N, C\] with N = 6, got shape"),
        ((SCORES, 2, "distinct"), {"features": FEATURES.long()}, "features: expected dtype .*, got .*int64"),
        ((SCORES, 2, "max_min"), {"features": FEATURES, "mask": SCORES}, "mask: expected dtype torch.bool, got"),
        (
            (SCORES, torch.tensor([1, 2]), "distinct"),
            {"features": FEATURES},
            "keep: coverage='distinct' takes an int, the same for all rows, got",
        ),
        (
            (SCORES, 2, "distinct"),
            {"features": FEATURES, "mask": SCORES > 0},
            "mask: coverage='distinct' takes rows without filler, got",
        ),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(
    given_arguments: tuple[object, ...], options: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*given_arguments, **options)  # type: ignore[arg-type]


def test_duplicates_are_removed_before_the_decoder_only() -> None:
    with pytest.raises(
        ValueError,
        match=r"Stage.coverage='distinct': it exists after the vision encoder only; .*: 'topk', .*'least_similar'$",
    ):
        Stage(layer=2, coverage="distinct")


# --- what is compared ----------------------------------------------------------------------------------------------

IMAGES = ((Image(),), (Image(), Image(24, 48)))


@pytest.mark.parametrize("coverage", BY_FEATURES)
@pytest.mark.parametrize("score", ["cls", "random"])
def test_tokens_are_compared_as_the_docs_say(coverage: str, score: str) -> None:
    """By what enters the projector, where the vision encoder ranks and the method does so; else as the decoder gets them.

    The images of a sample that was ranked in its vision encoder have their own part of the budget, in proportion.
    """
    model = build("llava", "gap_triton")
    inputs = prompt("llava", images=IMAGES, before=(3, 5), after=(4, 2))
    exponent = 2.0 if coverage == "coverage_gain" else 1.0
    gap_triton.configure(model, GapConfig(0.2, -1, score, coverage, exponent=exponent))
    embeds: list[Tensor] = []
    embeds_of_prompt(model, embeds)
    entering: list[Tensor] = []
    projector = model.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    selection = gap_triton.last_selection(model)
    in_tower = score == "cls" and coverage in ("coverage_gain", "distinct")
    taken = 0
    for sample, images in enumerate(IMAGES):
        rows = selection.candidates[sample]
        rows = rows[rows >= 0]
        before = entering[0].flatten(0, -2)[taken : taken + len(rows)]
        features = before if in_tower else embeds[0][sample, rows]
        scores, taken = selection.score[sample, : len(rows)], taken + len(rows)
        views = [len(rows) // len(images)] * len(images) if score == "cls" else [len(rows)]
        total, kept, start = -(-len(rows) // 5), [], 0
        for size in views:
            end = start + size
            share = total * end // len(rows) - total * start // len(rows)
            row = scores[start:end].tolist()
            kept += [start + i for i in sorted(expected(coverage, row, features[start:end], share, exponent))]
            start = end
        assert selection.visual_index[sample][-total:].tolist() == rows[kept].tolist()


@pytest.mark.parametrize("coverage", ["coverage_gain", "distinct"])
def test_a_merge_does_not_change_what_is_compared(coverage: str) -> None:
    """It records what enters the projector, by which nothing is compared where the vision encoder doesn't rank."""
    model = build("llava", "gap_triton")
    inputs = prompt("llava", images=((Image(),), (Image(),)))
    chosen = []
    for merge in ("none", "aggregation"):
        gap_triton.configure(model, GapConfig(0.3, -1, "text_similarity", coverage, merge))
        with torch.no_grad():
            model(**inputs)
        chosen.append(gap_triton.last_selection(model).visual_index)
    assert torch.equal(*chosen)


@pytest.mark.parametrize("coverage", ["coverage_gain", "distinct"])
def test_without_a_projector_they_are_compared_as_the_decoder_gets_them(coverage: str) -> None:
    model, inputs = ways.build(ways.MROPE, "gap_triton"), ways.make(ways.MROPE, "even")
    gap_triton.configure(model, GapConfig(0.4, -1, "received", coverage))
    embeds: list[Tensor] = []
    embeds_of_prompt(model, embeds)
    with torch.no_grad():
        model(**inputs)
    selection = gap_triton.last_selection(model)
    for sample, rows in enumerate(selection.candidates):
        scores = selection.score[sample].tolist()
        kept = sorted(expected(coverage, scores, embeds[0][sample, rows], math.ceil(0.4 * len(rows))))
        assert selection.visual_index[sample].tolist() == rows[kept].tolist()


def test_hidden_states_may_depend_on_the_text_behind() -> None:
    """Where visual tokens attend to it: such a choice isn't that of another text."""
    assert needs_text(Stage(0.5, 1, "random", "max_min"))
    assert not needs_text(Stage(0.5, -1, "random", "max_min"))
    assert not needs_text(Stage(0.5, 1, "random"))


@pytest.mark.parametrize("coverage", [each for each in BY_FEATURES if each != "distinct"])
def test_a_decoder_layer_compares_its_hidden_states(coverage: str) -> None:
    model = build("llava", "gap_triton")
    inputs = prompt("llava", images=IMAGES, before=(3, 5), after=(4, 2))
    exponent = 0.5 if coverage == "determinant" else 1.0
    gap_triton.configure(model, GapConfig(0.2, 1, "text", coverage, exponent=exponent))
    states: list[Tensor] = []
    layer = model.model.language_model.layers[1]
    handle = layer.register_forward_hook(
        lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    selection = gap_triton.last_selection(model)
    for sample in range(2):
        rows = selection.candidates[sample]
        rows = rows[rows >= 0]
        scores = selection.score[sample, : len(rows)].tolist()
        keep = -(-len(rows) // 5)
        kept = sorted(expected(coverage, scores, states[0][sample, rows], keep, exponent))
        assert selection.visual_index[sample][-keep:].tolist() == rows[kept].tolist()
        assert kept != sorted(ranked(scores)[:keep])
