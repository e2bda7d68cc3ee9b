"""Videos that are encoded with the prompt: ranked before the decoder by what the vision tower tells, frame by frame."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from support import model_types
from support.comparison import TOLERANCE, error
from support.installed_types import build_or_skip
from support.oracle import NAME as ORACLE
from support.oracle import MaskingOracle, core_of
from support.survivors import difference, expected_of, stays_of
from support.tiny import IMAGE, VIDEO, generate
from support.towers import GRID_MODELS, Picture, grid_model, grid_prompt, told_by_eager
from torch import Tensor

import gap_triton
from gap_triton import GapConfig

VIDEOS: tuple[tuple[Picture, ...], ...] = ((("video", (2, 6, 8)),), (("video", (3, 4, 6)),))
MIXED: tuple[tuple[Picture, ...], ...] = (
    (("video", (2, 4, 6)), ("image", (1, 6, 8))),
    (("image", (1, 4, 10)), ("video", (3, 4, 6)), ("image", (1, 10, 6))),
)
CASES = [(name, pictures) for name in GRID_MODELS for pictures in (VIDEOS, MIXED)]
if Version(transformers.__version__) >= Version("5.24"):
    CASES.append(("glm4v", VIDEOS))  # takes no images beside videos
IDS = [f"{name}-{'mixed' if pictures is MIXED else 'videos'}" for name, pictures in CASES]


def views_of(told: Tensor, samples: tuple[tuple[Picture, ...], ...]) -> list[list[Tensor]]:
    """``told`` [F, ...] by sample and, in the order of the prompt, by image or frame."""
    images = sum(h * w // 4 for sample in samples for kind, (_, h, w) in sample if kind == "image")
    start, found = {"image": 0, "video": images}, []
    for sample in samples:
        views = []
        for kind, (frames, height, width) in sample:
            for _ in range(frames):
                end = start[kind] + height * width // 4
                views.append(told[start[kind] : end])
                start[kind] = end
        found.append(views)
    return found


@pytest.mark.parametrize("score", ["received", "key_norm"])
@pytest.mark.parametrize(("name", "samples"), CASES, ids=IDS)
def test_frames_are_ranked_by_the_tower(
    name: str, samples: tuple[tuple[Picture, ...], ...], score: str
) -> None:
    model, reference = grid_model(name), grid_model(name)
    inputs = grid_prompt(model, samples)
    expected = views_of(told_by_eager(reference, inputs)[score], samples)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    with gap_triton.pruning(model, GapConfig(0.4, -1, score)), torch.no_grad():
        model(**inputs)
        selection = gap_triton.last_selection(model)
        output = generate(model, inputs, tokens=3)
        again = gap_triton.last_selection(model)
    # As `generate` encodes them ahead of the forward, which gets no pixels.
    assert torch.equal(again.index, selection.index)
    stays = stays_of(selection, inputs["attention_mask"])
    for sample, views in enumerate(expected):
        rows = visual[sample].nonzero()[:, 0]
        score_by_token = torch.cat(views)
        torch.testing.assert_close(selection.score[sample, : len(rows)], score_by_token, rtol=1e-4, atol=1e-6)
        assert int(stays[sample, rows].sum()) == -(-2 * len(rows) // 5)
        for scores, kept in zip(views, stays[sample, rows].split([len(view) for view in views]), strict=True):
            assert 0 < int(kept.sum()) < len(kept)
            assert float(scores[kept].min()) > float(scores[~kept].max())
    if name in model_types.NOT_PLAIN:
        assert (
            difference(output, expected_of(reference, inputs, output.sequences, stays, features=False))
            <= TOLERANCE
        )
        return
    core_of(reference)[1].set_attn_implementation(ORACLE)
    with MaskingOracle(reference, -1, 0.4, chosen=inputs["attention_mask"].bool() & ~stays):
        masked = generate(reference, inputs, tokens=3)
    assert torch.equal(output.sequences, masked.sequences)
    assert error(output, masked) <= TOLERANCE


def test_frames_that_a_tower_merges_are_refused() -> None:
    """ERNIE makes one token of two frames, which are two rows of its tower."""
    model = build_or_skip("ernie4_5_vl_moe")
    inputs = grid_prompt(model, ((("video", (2, 4, 6)),),))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:, :48]
    ids = inputs["input_ids"][0].tolist()
    inputs["input_ids"] = torch.tensor([ids[: ids.index(VIDEO)] + [VIDEO] * 6 + [10, 11]])
    for name in ("attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids"):
        inputs.pop(name, None)
    types = (inputs["input_ids"] == VIDEO).int()
    with (
        torch.no_grad(),
        gap_triton.pruning(model, GapConfig(0.4, -1, "received")),
        pytest.raises(ValueError, match="made 6 features of 12 rows of 'received'"),
    ):
        model(**inputs, mm_token_type_ids=2 * types, moe_mm_token_type_ids=types)
