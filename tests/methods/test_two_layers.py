"""Choosing by two layers of the vision encoder, and merging into what is most like, against loops in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import ways
from support.embeds import embeds_of_prompt
from support.naive.strategies import chosen_by_windows, chosen_with_neighbours, clustered, expect
from torch import Tensor

import gap_triton
from gap_triton import GapConfig
from gap_triton.strategies import choose, cluster
from gap_triton.strategies.coverage import choose_on_grid
from gap_triton.vision_tower import find_tower
from gap_triton.vision_tower.finding import earlier_layers, layers_without_windows

NAN, INF = math.nan, math.inf
NAIVE = {"anchors": chosen_with_neighbours, "windows": chosen_by_windows}
SCORE = st.one_of(st.sampled_from([0.0, 1.0, INF, -INF, NAN]), st.floats(-4, 4, width=32))
SIDE = st.integers(1, 11)
TOLERANCE = 1e-5


@pytest.mark.parametrize("coverage", NAIVE)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_choice(coverage: str, data: st.DataObject) -> None:
    grid = data.draw(st.tuples(SIDE, SIDE))
    cells, groups = grid[0] * grid[1], data.draw(st.integers(1, 2))
    rows = st.lists(st.lists(SCORE, min_size=cells, max_size=cells), min_size=groups, max_size=groups)
    listed, earlier = data.draw(rows), data.draw(rows)
    keep = data.draw(st.integers(0, cells))
    scores, before = torch.tensor(listed), torch.tensor(earlier)
    found = choose_on_grid(scores, keep, coverage, grid, before)
    wanted = [
        sorted(NAIVE[coverage](*each, keep, grid)) if keep < cells else list(range(cells))
        for each in zip(listed, earlier, strict=True)
    ]
    assert found.tolist() == wanted


def test_numbers_of_anchors_and_of_each_window() -> None:
    """4, 3, 1 anchors of 192, 128, 64; 96 of 576 are three of each of 16 windows, and 48 more."""
    earlier = torch.zeros(1, 576)
    inside = [24 * row + column for row in (3, 9, 15, 21) for column in (5,)]
    earlier[0, inside] = 1.0
    last = torch.arange(576.0)[None]
    for keep, anchors in ((192, 4), (128, 3), (64, 1)):
        kept = set(choose_on_grid(last, keep, "anchors", (24, 24), earlier)[0].tolist())
        around = {cell + step for cell in inside[:anchors] for step in (0, -1, 1, -24, 24)}
        rest = [cell for cell in range(576) if cell not in around]
        assert kept == around | set(rest[len(rest) - (keep - len(around)) :])
    generator = torch.Generator().manual_seed(0)
    earlier = torch.rand(1, 576, generator=generator)
    kept = choose_on_grid(-1e9 * torch.ones(1, 576), 96, "windows", (24, 24), earlier)[0]
    is_kept = torch.zeros(576).index_fill_(0, kept, 1.0).view(4, 6, 4, 6).sum((1, 3))
    assert int(is_kept.min()) >= 3
    assert int(is_kept.sum()) == 96


def test_they_need_a_whole_grid() -> None:
    with pytest.raises(ValueError, match=r"coverage: expected one of 'topk', .*'distinct', got 'anchors'"):
        choose(torch.zeros(1, 4), 2, "anchors")


@pytest.mark.parametrize("score", ["key_norm", "random"])
def test_they_need_a_score_of_both_layers(score: str) -> None:
    message = (
        rf"GapConfig.coverage='windows' with score='{score}': it ranks in two layers .*'cls' or 'received'"
    )
    with pytest.raises(ValueError, match=message):
        GapConfig(0.5, -1, score, "windows")


@pytest.mark.parametrize(
    ("layers", "full", "middle", "early"),
    [
        (24, None, 8, 5),  # CLIP: HIPRUNE_OBJECT_LAYER 9, counted from 1, and VScan's attentions[5]
        (32, [7, 15, 23, 31], 15, 7),  # Qwen2.5-VL: 16, and the first with full attention
        (2, None, 0, 0),
        (3, [1], 1, 1),
    ],
)
def test_the_earlier_layers_are_as_published(
    layers: int, full: list[int] | None, middle: int, early: int
) -> None:
    seeing = layers_without_windows(SimpleNamespace(fullatt_block_indexes=full), layers)
    assert earlier_layers(seeing, layers) == {"middle": middle, "early": early}


@pytest.mark.parametrize("score", ["cls", "received"])
@pytest.mark.parametrize("coverage", NAIVE)
def test_the_score_of_the_earlier_layer(coverage: str, score: str) -> None:
    """It is what that layer gives where it is the one whose output becomes the features."""
    model, inputs = ways.build("llava", "gap_triton"), ways.make("llava", "even")
    gap_triton.configure(model, GapConfig(0.8, -1, score, coverage))
    with torch.no_grad():
        model(**inputs)
    selection = gap_triton.last_selection(model)
    tower = find_tower(model.model)
    place = {"anchors": "middle", "windows": "early"}[coverage]
    assert tower.earlier[place] is not tower.attention
    (layer,) = (
        number for number, each in enumerate(tower.layers) if tower.earlier[place] in set(each.modules())
    )
    other = ways.build("llava", "gap_triton")
    other.model.config.vision_feature_layer = layer + 1
    gap_triton.configure(other, GapConfig(0.8, -1, score))
    with torch.no_grad():
        other(**inputs)
    earlier = gap_triton.last_selection(other).score
    for sample, rows in enumerate(selection.candidates):
        given_scores = selection.score[sample].tolist(), earlier[sample].tolist()
        kept = NAIVE[coverage](*given_scores, math.ceil(0.8 * len(rows)), (6, 6))
        assert selection.visual_index[sample].tolist() == rows[sorted(kept)].tolist()
    assert not torch.equal(selection.score, earlier)


# --- merging -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_cluster(data: st.DataObject) -> None:
    groups, rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 14))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    features = torch.randn(groups, rows, 5, generator=generator)
    keeps = [sorted(data.draw(st.sets(st.integers(0, rows - 1)))) for _ in range(groups)]
    width = max(map(len, keeps))
    kept = torch.tensor([[-1] * (width - len(each)) + each for each in keeps], dtype=torch.int64).view(
        groups, width
    )
    assume(all(map(len, keeps)))
    expect(
        cluster(features, kept), [clustered(*each) for each in zip(features, keeps, strict=True)], TOLERANCE
    )


def test_what_nothing_goes_to_is_what_it_was() -> None:
    features = torch.tensor([[[1.0, 0], [0, 1], [0, 3], [0.1, 0]]], dtype=torch.bfloat16)
    found = cluster(features, torch.tensor([[0, 1, 3]]))
    assert torch.equal(found.features[:, [0, 2]], features[:, [0, 3]])
    assert found.features[0, 1].tolist() == [0, 2]
    assert torch.equal(cluster(features, torch.arange(4)[None]).features, features)
    assert cluster(features[:, :0], torch.empty(1, 0, dtype=torch.int64)).features.shape == (1, 0, 2)


@pytest.mark.parametrize(
    ("coverage", "merge"), [("windows", "cluster"), ("coverage_gain", "average"), ("topk", "cluster")]
)
def test_they_merge_as_the_decoder_gets_them(coverage: str, merge: str) -> None:
    """Also where something else is recorded of what enters the projector."""
    model, inputs = ways.build("llava", "gap_triton"), ways.make("llava", "even")
    embeds: list[Tensor] = []
    embeds_of_prompt(model, embeds)
    with torch.no_grad():
        gap_triton.configure(model, GapConfig(1.0, 1))
        model(**inputs)
        gap_triton.configure(model, GapConfig(12, -1, "cls", coverage, merge))
        model(**inputs)
    before, after = embeds
    selection = gap_triton.last_selection(model)
    for sample in range(len(before)):
        rows = selection.candidates[sample].tolist()
        kept = [rows.index(row) for row in selection.visual_index[sample].tolist()]
        features, found = before[sample, rows].double(), after[sample, rows].double()
        if merge == "cluster":
            for row, mean in clustered(features, kept).items():
                torch.testing.assert_close(found[row], mean, rtol=TOLERANCE, atol=TOLERANCE)
            continue
        changed = [row for row in kept if not torch.equal(found[row], features[row])]
        dropped = [row for row in range(len(rows)) if row not in kept or row in changed]
        assert len(changed) == 1
        mean = features[dropped].mean(0)
        torch.testing.assert_close(found[changed[0]], mean, rtol=TOLERANCE, atol=TOLERANCE)
