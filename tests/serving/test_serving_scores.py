"""Scores from the attention of a vision tower, and what is chosen by them, as the plug-in for vLLM computes both."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gap_kernels import topk_indices
from support import towers
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from gap_triton import GapConfig
from gap_triton.strategies import Coverage, spatial_order
from gap_triton.strategies.by_features import BY_FEATURES, WEIGHTED
from gap_triton.strategies.coverage import choose as choose_rows
from gap_triton.strategies.draw import draw
from gap_triton.strategies.two_layers import by_windows, with_neighbours
from gap_triton.strategies.without_filler import contextual_of_rest
from gap_triton.vision.layout import Layout, layout_of_frames, layout_of_grid
from gap_triton.vision.pictures import numbered_newline
from gap_triton.vision_tower import TowerOutput, find_tower
from gap_triton.vllm.choose import Encoded, choose, prune, survivors_by_view
from gap_triton.vllm.layouts import PackedFamily, SquareFamily, TiledFamily, chunks, layout_of_tiles
from gap_triton.vllm.options import COVERAGES, MERGES
from gap_triton.vllm.plan import Plan
from gap_triton.vllm.scores import TowerScores

TOLERANCE = 1e-5


class Attention(nn.Module):
    """Takes query, key and value as the encoder attention of vLLM does, and ends there."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads = self.num_kv_heads = heads
        self.scale = size**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Any = None) -> None:
        pass


def naive(query: Tensor, key: Tensor, bounds: list[int], leading: int) -> dict[str, Tensor]:
    """Scores of query and key [B, S, H, D], sequence by sequence and head by head."""
    batch, _, heads, size = query.shape
    found: dict[str, list[Tensor]] = {"received": [], "cls": [], "key_norm": []}
    for sample in range(batch):
        for first, after in pairwise(bounds):
            rows = slice(first, after)
            maps = [
                torch.softmax(
                    query[sample, rows, head].double() @ key[sample, rows, head].double().T / size**0.5, -1
                )
                for head in range(heads)
            ]
            mean = torch.stack(maps).mean(0)
            found["received"].append(mean.mean(0)[leading:])
            found["cls"].append(mean[0, leading:])
            found["key_norm"].append(key[sample, rows].double().flatten(1).norm(dim=-1)[leading:])
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.fixture
def query_and_key() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 10, 4, 8, generator=generator), torch.randn(2, 10, 4, 8, generator=generator)


def alone(x: Tensor) -> Tensor:
    """Of one process."""
    return x


NAMES = ("received", "cls", "key_norm")


def test_scores_of_a_batch_of_images(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = query_and_key
    attention = Attention(4, 8)
    watched = TowerScores({"": attention}, 1, 1, alone, alone)
    expected = naive(query, key, [0, 10], 1)
    for flat in (False, True):  # CLIP's gives its heads side by side
        arguments = [each.flatten(2) if flat else each for each in (query, key, key)]
        with watched.record(NAMES) as scores:
            attention(*arguments)
        assert set(scores) == set(NAMES)
        for name in NAMES:
            torch.testing.assert_close(scores[name].double(), expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_scores_of_images_in_one_sequence(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = (each[:1] for each in query_and_key)
    attention = Attention(4, 8)
    watched = TowerScores({"": attention}, 0, 1, alone, alone)
    with watched.record({"received", "key_norm"}) as scores:
        attention(query=query, key=key, value=key, cu_seqlens=torch.tensor([0, 3, 10]))
    expected = naive(query, key, [0, 3, 10], 0)
    for name in ("received", "key_norm"):
        torch.testing.assert_close(scores[name].double(), expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_ranks_that_hold_half_of_the_heads_agree(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = query_and_key
    local: list[list[Tensor]] = []
    for half in (slice(0, 2), slice(2, 4)):
        attention, parts = Attention(2, 8), []
        with TowerScores({"": attention}, 1, 2, lambda x, parts=parts: parts.append(x) or x, alone).record(
            NAMES
        ):
            attention(query[:, :, half], key[:, :, half], key[:, :, half])
        local.append(parts)
    sums = [first + second for first, second in zip(*local, strict=True)]
    attention, queue = Attention(2, 8), list(sums)
    with TowerScores({"": attention}, 1, 2, lambda x: queue.pop(0), alone).record(NAMES) as scores:
        attention(query[:, :, :2], key[:, :, :2], key[:, :, :2])
    expected = naive(query, key, [0, 10], 1)
    for name in NAMES:
        torch.testing.assert_close(scores[name].double(), expected[name], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("batch", [1, 2])
def test_keys_of_all_ranks_are_put_together(query_and_key: tuple[Tensor, Tensor], batch: int) -> None:
    query, key = (each[:batch] for each in query_and_key)
    local: list[Tensor] = []

    def gather(keys: Tensor) -> Tensor:
        assert keys.is_contiguous()
        local.append(keys)
        return keys

    for half in (slice(0, 2), slice(2, 4)):
        attention = Attention(2, 8)
        # A tower's attention gets parts of one tensor.
        parts = torch.cat([each[:, :, half].flatten(2) for each in (query, key, key)], -1).chunk(3, -1)
        with TowerScores({"": attention}, 0, 2, alone, gather).record({"keys"}):
            attention(*parts)
    assert torch.equal(torch.cat(local, -1), key.flatten(2).flatten(0, 1))


def test_the_mean_hidden_state_of_several_layers() -> None:
    """Of what each puts out, also where the next one writes into it; of nothing that isn't asked for."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            output = self.norm(x) * 2
            x.zero_()
            return output

    layers = [Layer() for _ in range(3)]
    watched = TowerScores({}, 0, 1, alone, alone, norms=[layer.norm for layer in layers[1:]])
    state = torch.rand(6, 1, 4, generator=torch.Generator().manual_seed(2))
    mean = (state * 2 + state * 4)[:, 0] / 2
    for needs in ({"similarity"}, {"received"}, {"similarity"}):
        x = state.clone()
        with watched.record(needs) as recorded:
            for layer in layers:
                x = layer(x)
        if "similarity" in needs:
            torch.testing.assert_close(recorded["similarity"], mean, rtol=TOLERANCE, atol=TOLERANCE)
        else:
            assert not recorded


def test_scores_of_earlier_layers(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = query_and_key
    last, middle, early = (Attention(4, 8) for _ in range(3))
    watched = TowerScores({"": last, "middle_": middle, "early_": early}, 1, 1, alone, alone)
    with watched.record({"received", "middle_received", "early_cls"}) as scores:
        for layer, number in ((early, 1), (middle, 2), (last, 3)):
            layer(query * number, key, key)
    expected = {
        name: naive(query * number, key, [0, 10], 1)[name.rpartition("_")[2]]
        for name, number in (("early_cls", 1), ("middle_received", 2), ("received", 3))
    }
    assert set(scores) == set(expected)
    for name in expected:
        torch.testing.assert_close(scores[name].double(), expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_a_layer_may_be_two_of_them(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = query_and_key
    only = Attention(4, 8)
    with TowerScores({"": only, "middle_": only}, 1, 1, alone, alone).record({"cls", "middle_cls"}) as scores:
        only(query, key, key)
    assert torch.equal(scores["cls"], scores["middle_cls"])


def test_what_enters_the_projector_is_recorded_call_by_call(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = query_and_key
    attention, projector = Attention(4, 8), nn.Linear(8, 3)
    watched = TowerScores({"": attention}, 1, 1, alone, alone, projector)
    images = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    with watched.record({"features", "cls"}) as recorded:
        attention(query, key, key)
        projector(images[:2])
        projector(images[2])
    assert set(recorded) == {"features", "cls"}
    assert torch.equal(recorded["features"], images.flatten(0, 1))
    projector(images)
    with watched.record({"features"}) as features_only:
        attention(query, key, key)  # which is not asked for its scores
        projector(images)
    assert set(features_only) == {"features"}
    assert len(recorded["features"]) == 15


def test_nothing_is_scored_outside_of_a_recording(query_and_key: tuple[Tensor, Tensor]) -> None:
    attention = Attention(4, 8)
    watched = TowerScores({"": attention}, 1, 1, alone, alone)
    with pytest.raises(ZeroDivisionError), watched.record(NAMES) as scores:
        raise ZeroDivisionError
    attention(*query_and_key, query_and_key[1])
    with watched.record(()) as none:
        attention(*query_and_key, query_and_key[1])
    assert scores == none == {}


# --------------------------------------------------------------------------------------------- layouts
def test_patches_become_tokens_as_they_do_in_transformers() -> None:
    tower = find_tower(towers.family("qwen2_5_vl").model)
    assert tower.window is not None
    grids = [(1, 8, 12), (1, 6, 4)]
    qwen = PackedFamily((7,), 0, 3, merge=towers.MERGE, window=tower.window)
    fields = {"image_grid_thw": torch.tensor(grids)}
    layouts = qwen.layouts(fields, 2)
    assert [layout.views[0].grid for layout in layouts] == [(4, 6), (3, 2)]
    rows = torch.randn(sum(h * w for _, h, w in grids), generator=torch.Generator().manual_seed(1))
    expected = tower.to_features(rows, {"image_grid_thw": grids}, 30)
    first, second = qwen.by_image(rows, fields, layouts)
    assert torch.equal(first, expected[:24])
    assert torch.equal(second, expected[24:])
    without = PackedFamily((7,), 0, 3, merge=towers.MERGE)
    assert not torch.equal(without.by_image(rows, fields, layouts)[0], first)


def test_frames_of_videos_are_put_back_into_raster_order() -> None:
    tower = find_tower(towers.grid_model("qwen2_5_vl").model)
    grids = [(2, 8, 12), (3, 6, 4)]
    qwen = PackedFamily((7,), 0, 3, merge=towers.MERGE, window=tower.window)
    fields = {"video_grid_thw": torch.tensor(grids)}
    layouts = qwen.layouts(fields, 2)
    assert [len(layout.views) for layout in layouts] == [2, 3]
    assert [layout.views[0].grid for layout in layouts] == [(4, 6), (3, 2)]
    rows = torch.randn(sum(t * h * w for t, h, w in grids), generator=torch.Generator().manual_seed(1))
    expected = tower.to_features(rows, {"video_grid_thw": grids}, 48 + 18)
    assert torch.equal(torch.cat(qwen.by_image(rows, fields, layouts)), expected)


def test_ids_of_a_video() -> None:
    sizes = {"video_grid_thw": torch.tensor([[3, 4, 4]])}
    for frame_start, seconds, times in (
        (None, None, [0, 2, 4]),
        (None, torch.tensor([0.75]), [0, 1, 3]),
        (5, None, [0, 0, 0]),  # each is numbered as an image
    ):
        family = PackedFamily((7,), 0, 3, merge=2, per_second=2.0, frame_start=frame_start)
        fields = sizes if seconds is None else {**sizes, "second_per_grid_ts": seconds}
        (layout,), (interval,) = family.layouts(fields, 1), family.intervals(fields, 1)
        time, row, column = family.offsets(layout, interval).unflatten(1, (3, 4))
        assert time.T.tolist() == [times] * 4
        assert row.tolist() == [[0, 0, 1, 1]] * 3
        assert column.tolist() == [[0, 1, 0, 1]] * 3
    # An image has no seconds.
    assert family.intervals({"image_grid_thw": torch.tensor([[1, 4, 4]])}, 1) == [1.0]


def test_ids_of_an_image() -> None:
    assert PackedFamily((7,), 0, 3, merge=2).offsets(layout_of_grid((2, 3))).tolist() == [
        [0] * 6,
        [0, 0, 0, 1, 1, 1],
        [0, 1, 2, 0, 1, 2],
    ]
    assert SquareFamily((7,), 1, 1, side=2).offsets(layout_of_grid((2, 2))).tolist() == [[0, 1, 2, 3]] * 3
    assert TILES.offsets(layout_of_tiles(TILES, 8, 16)).tolist() == [list(range(4 + 2 * 5))] * 3


def test_a_batch_is_taken_apart() -> None:
    packed = PackedFamily((7,), 0, 3, merge=2)
    sizes = torch.tensor([[1, 2, 4], [1, 2, 2], [1, 4, 4]])
    fields = {"pixel_values": torch.arange(28), "image_grid_thw": sizes}
    part = packed.part(fields, 1, 3)
    assert part["pixel_values"].tolist() == list(range(8, 28))
    assert torch.equal(part["image_grid_thw"], sizes[1:])
    of_videos = {
        "pixel_values_videos": fields["pixel_values"],
        "video_grid_thw": torch.tensor([[2, 2, 4], [1, 2, 6]]),
        "second_per_grid_ts": torch.tensor([0.5, 2.0]),
    }
    part = packed.part(of_videos, 1, 2)
    assert part["pixel_values_videos"].tolist() == list(range(16, 28))
    assert packed.intervals(part, 1) == [2.0]
    square = SquareFamily((7,), 1, 1, side=2)
    assert square.part({"pixel_values": torch.arange(5)}, 1, 3)["pixel_values"].tolist() == [1, 2]
    assert [layout.views[0].grid for layout in square.layouts({}, 2)] == [(2, 2), (2, 2)]


# What LLaVA-NeXT makes of tiles of 2 x 2 tokens of 4 x 4 pixels each, as transformers packs it.
OWNER = SimpleNamespace(
    config=SimpleNamespace(
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 16]],
        vision_config=SimpleNamespace(image_size=8, patch_size=4),
    )
)


def pack(size: Tensor, features: Tensor) -> Tensor:
    packed, _ = LlavaNextModel.pack_image_features(
        OWNER, [features], size[None], vision_feature_select_strategy="full", image_newline=numbered_newline()
    )
    return packed[0]


TILES = TiledFamily((7,), 1, 1, side=2, pixels=8, pinpoints=((8, 8), (8, 16), (16, 16)), pack=pack)


def test_where_the_tokens_of_tiles_stand() -> None:
    sizes = torch.tensor([[8, 16], [16, 8]])
    wide, portrait = TILES.layouts({"image_sizes": sizes}, 2)
    overview, details = wide.views
    assert overview.numbers.tolist() == overview.features.tolist() == [0, 1, 2, 3]
    assert details.grid == (2, 4)
    assert details.numbers.tolist() == [4, 5, 6, 7, 9, 10, 11, 12]  # 8 and 13 are newlines
    assert details.features.tolist() == [4, 5, 8, 9, 6, 7, 10, 11]  # row by row of two tiles
    assert wide.counts == (14,)
    # Of 2 x 2 tiles, of which the outer columns are cut off: they show nothing of the image.
    assert portrait.views[1].grid == (4, 2)
    assert portrait.views[1].features.tolist() == [5, 8, 7, 10, 13, 16, 15, 18]
    assert portrait.counts == (4 + 4 * 3,)


def test_tiles_that_fill_up_a_batch_are_left_out() -> None:
    layouts = TILES.layouts({"image_sizes": torch.tensor([[8, 16], [16, 16]])}, 2)
    rows = torch.arange(2 * 5 * 4)  # both have 5 tiles, as the second asks for
    first, second = TILES.by_image(rows, {"pixel_values": torch.zeros(2, 5, 3, 8, 8)}, layouts)
    for view in layouts[0].views:
        assert first[view.features].max() < 3 * 4
    for view in layouts[1].views:
        assert second[view.features].min() >= 5 * 4
    # Where each image has its own number they come as a list.
    tiles = [torch.zeros(3, 3, 8, 8), torch.zeros(5, 3, 8, 8)]
    first, second = TILES.by_image(rows[: 8 * 4], {"pixel_values": tiles}, layouts)
    assert (len(first), len(second)) == (3 * 4, 5 * 4)


def test_an_image_between_whose_features_a_model_interpolates_has_no_places() -> None:
    family = replace(TILES, pack=lambda size, features: pack(size, features) * 0.5)
    layout = layout_of_tiles(family, 8, 16)
    assert layout.counts == (14,)
    assert layout.views == ()
    assert choose(Plan(14, "received", "topk", "kept", 0), layout) is None


@pytest.mark.parametrize(
    ("grids", "most", "expected"),
    [
        ([(2, 2)] * 5, 8, [(0, 2), (2, 4), (4, 5)]),
        ([(2, 2)] * 3, 100, [(0, 3)]),
        ([(9, 9), (1, 1), (9, 9)], 8, [(0, 1), (1, 2), (2, 3)]),  # an image that is too large goes alone
        ([(1, 3), (1, 5), (1, 1)], 8, [(0, 2), (2, 3)]),
        ([], 8, []),
    ],
)
def test_images_are_encoded_in_chunks(
    grids: list[tuple[int, int]], most: int, expected: list[tuple[int, int]]
) -> None:
    assert list(chunks(list(map(layout_of_grid, grids)), most)) == expected


# --------------------------------------------------------------------------------------------- choices
def chosen(plan: Plan, layout: Layout, features: Tensor | None = None, **tower: Any) -> list[int]:
    """The survivors of an image, whose features are returned as they were given."""
    if "entering" in tower:  # what enters the projector
        tower["features"] = tower.pop("entering")
    if features is None:
        features = torch.arange(layout.counts[0], dtype=torch.float32)[:, None]
    index, kept = prune(plan, layout, Encoded(features, TowerOutput(**tower)))
    assert index is not None
    assert torch.equal(kept, features[index])
    return index.tolist()


def test_what_is_chosen() -> None:
    score = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2, 0.3])
    layout = layout_of_grid((2, 3))
    best = Plan(2, "received", "topk", "kept", 0)
    assert chosen(best, layout, received=score) == [1, 3]
    assert choose(best, layout) is None  # nothing is known before the tower ran
    by_region = Plan(2, "received", "region", "kept", 0)
    assert chosen(by_region, layout, received=score) == [1, 2]  # 0.7 is in the region of 0.9
    features = torch.rand(6, 2)
    index, kept = prune(Plan(6, "received", "topk", "kept", 0), layout, Encoded(features))
    assert index is None  # all survive
    assert kept is features


def test_what_needs_no_tower_is_known_before_it_runs() -> None:
    layout = layout_of_grid((3, 4))
    for plan, expected in (
        (Plan(5, "spatial", "topk", "kept", 0), (spatial_order((3, 4)) < 5).nonzero()[:, 0].tolist()),
        (Plan(5, "random", "topk", "kept", 9), draw(9, 0, 12).topk(5).indices.sort().values.tolist()),
    ):
        before = choose(plan, layout)
        assert before is not None
        assert before.tolist() == chosen(plan, layout) == expected


def test_how_many_tokens_of_each_frame_survive_is_known_before_the_tower_runs() -> None:
    """Where places matter: whatever chooses them, and whatever the others are merged into."""
    layout, generator = layout_of_frames(3, (4, 5)), torch.Generator().manual_seed(8)
    features = torch.randn(60, 8, generator=generator)
    tower = {
        name: torch.rand(60, generator=generator)
        for name in ("received", "middle_received", "early_received")
    }
    tower["keys"] = tower["similarity"] = torch.randn(60, 8, generator=generator)
    counted = 0
    for score, coverage, merge, kept in product(
        ("received", "spatial", "random"), COVERAGES, MERGES, (7, 31)
    ):
        plan = Plan(kept, score, coverage, "kept", 3, merge=merge)
        try:
            GapConfig(kept, -1, score, coverage=coverage, merge=merge)
        except ValueError:
            continue  # no method
        counts = survivors_by_view(plan, layout)
        if counts is None:
            assert score == "random"
            continue
        index, _ = prune(plan, layout, Encoded(features, TowerOutput(**tower)))
        assert index is not None
        assert counts == torch.bincount(index // 20, minlength=3).tolist(), plan
        assert sum(counts) == kept
        counted += 1
    assert counted > 50
    assert survivors_by_view(Plan(60, "random", "max_min", "kept", 0), layout) == [20] * 3  # all of them
    assert survivors_by_view(Plan(9, "random", "max_min", "kept", 0), layout) is None
    assert survivors_by_view(Plan(9, "random", "topk", "kept", 0, merge="average"), layout) is None


def test_what_is_chosen_of_tiles() -> None:
    layout = layout_of_tiles(TILES, 8, 16)
    # Of rows of the tower: the overview, then two tiles.
    score = torch.tensor([30, 90, 10, 20, 50, 11, 60, 13, 12, 80, 14, 70]) / 100
    for kept, expected in (
        # Both newlines stay, 8 and 13; and of 5 others the overview has a third, rounded down.
        (7, [1, 4, 7, 8, 9, 12, 13]),
        (11, [0, 1, 3, 4, 7, 8, 9, 10, 11, 12, 13]),
        (2, [7, 8]),  # at most half of what is kept are newlines
    ):
        assert chosen(Plan(kept, "received", "topk", "kept", 0), layout, received=score) == expected
    # A draw asks nothing of places: a newline is a token as any.
    drawn = draw(9, 0, 14).topk(5).indices.sort().values.tolist()
    assert chosen(Plan(5, "random", "topk", "kept", 9), layout) == drawn


@pytest.mark.parametrize("score", ["received", "random"])
@pytest.mark.parametrize("coverage", BY_FEATURES)
def test_tokens_that_are_compared(coverage: Coverage, score: str) -> None:
    """By what enters the projector where the tower ranks and the coverage asks for it, else as the decoder gets them."""
    generator = torch.Generator().manual_seed(2)
    layout = layout_of_grid((4, 6))
    features, entering = torch.randn(24, 5, generator=generator), torch.randn(24, 7, generator=generator)
    ranks = torch.rand(24, generator=generator)
    exponent = 2.0 if coverage in WEIGHTED else 1.0
    plan = Plan(9, score, coverage, "kept", 4, exponent)
    assert choose(plan, layout) is None
    found = chosen(plan, layout, features, received=ranks, entering=entering)
    by_entering = score == "received" and coverage in ("coverage_gain", "distinct")
    scores = ranks if score == "received" else draw(4, 0, 24)
    compared = entering if by_entering else features
    expected = choose_rows(scores[None], 9, coverage, features=compared[None], exponent=exponent)
    assert found == expected[0].tolist()
    without = chosen(plan, layout, features, received=ranks)
    assert (
        without
        == choose_rows(scores[None], 9, coverage, features=features[None], exponent=exponent)[0].tolist()
    )


@pytest.mark.parametrize(
    ("coverage", "choose_by_two"), [("anchors", with_neighbours), ("windows", by_windows)]
)
def test_coverages_by_two_layers(coverage: Coverage, choose_by_two: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    last, earlier = torch.rand(96, generator=generator), torch.rand(96, generator=generator)
    plan = Plan(60, "received", coverage, "kept", 0)
    name = {"anchors": "middle_received", "windows": "early_received"}[coverage]
    found = chosen(plan, layout_of_grid((8, 12)), received=last, **{name: earlier})
    by_both, by_one = (choose_by_two(last[None], each[None], 60, (8, 12)) for each in (earlier, last))
    assert found == topk_indices(by_both, 60)[0].tolist()
    assert found != topk_indices(by_one, 60)[0].tolist()


def test_tokens_of_tiles_are_compared_with_those_of_their_view() -> None:
    layout = layout_of_tiles(TILES, 8, 16)
    generator = torch.Generator().manual_seed(3)
    # Rows of the tower, of which those of the tiles are put together.
    entering, ranks = torch.randn(12, 5, generator=generator), torch.rand(12, generator=generator)
    features = torch.randn(14, 4, generator=generator)
    by_gain = Plan(8, "received", "coverage_gain", "kept", 0)
    expected = [8, 13]
    for view, keep in zip(layout.views, (2, 4), strict=True):
        rows = torch.from_numpy(view.features)
        best = choose_rows(ranks[rows][None], keep, "coverage_gain", features=entering[rows][None])
        expected += view.numbers[best[0].numpy()].tolist()
    assert chosen(by_gain, layout, features, received=ranks, entering=entering) == sorted(expected)
    # Where nothing ranks them by their places, all are compared, newlines among them.
    everywhere = choose_rows(ranks.new_zeros(1, 14), 8, "max_min", features=features[None])[0].tolist()
    assert chosen(Plan(8, "random", "max_min", "kept", 0), layout, features) == everywhere


# --------------------------------------------------------------------------------------------- merging
@pytest.mark.parametrize("has_projector", [True, False])
def test_tokens_that_are_merged(has_projector: bool) -> None:
    """As they enter the projector, where there is one, and it then maps what they make."""
    generator = torch.Generator().manual_seed(6)
    layout, projector = layout_of_grid((4, 6)), nn.Linear(7, 5)
    entering, keys = torch.randn(24, 7, generator=generator), torch.randn(24, 8, generator=generator)
    score = torch.rand(24, generator=generator)
    features = projector(entering).detach()
    plan = Plan(10, "received", "topk", "kept", 0, merge="contextual")
    recorded = {"received": score, "keys": keys}
    if has_projector:
        recorded["features"] = entering
    with torch.no_grad():
        index, kept = prune(plan, layout, Encoded(features, TowerOutput(**recorded, projector=projector)))
    ranked = score.argsort(descending=True)
    dominant, rest = (each.sort().values[None] for each in ranked.split((8, 16)))  # of 10, two are contextual
    merged = contextual_of_rest(
        (entering if has_projector else features)[None], keys[None], dominant, rest, 2
    )
    changed = projector(merged.features[0]).detach() if has_projector else merged.features[0]
    assert index is not None
    assert index.tolist() == sorted([*dominant[0].tolist(), *merged.index[0].tolist()])
    expected = features.clone()
    expected[merged.index[0]] = changed
    torch.testing.assert_close(kept, expected[index], rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.equal(kept, features[index])
