"""The text that may judge an image: against loops in Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import text_raters
from support.naive.raters import assert_raters
from torch import Tensor
from torch.library import opcheck


def case(batch: int, rows: int, visual: int, text: int, channels: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, and distinct visual and text rows, some of them filler."""
    generator = torch.Generator().manual_seed(rows)
    embeds = torch.randn(batch, rows, channels, generator=generator)
    order = torch.rand(batch, rows, generator=generator).argsort(1)
    hidden = torch.rand(batch, rows, generator=generator) < 0.2
    order = torch.where(hidden, -1, order)
    return embeds, order[:, :visual], order[:, visual : visual + text]


@pytest.mark.parametrize(
    "sizes", [(1, 2, 1, 1), (2, 12, 5, 4), (3, 50, 33, 17), (2, 40, 3, 35), (1, 9, 0, 4), (2, 9, 4, 0)]
)
def test_against_loops(sizes: tuple[int, int, int, int]) -> None:
    embeds, visual_index, text_rows = case(*sizes)
    assert_raters(text_raters(embeds, visual_index, text_rows), embeds, visual_index, text_rows)


def test_by_hand() -> None:
    """Each of four patches is for one word alone: two for the first, one for the next two, which are at the mean."""
    words = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    embeds = torch.cat([200 * torch.eye(4), words])[None]
    found = text_raters(embeds, torch.tensor([[0, 1, -1, 2, 3]]), torch.tensor([[7, 6, -1, 5, 4]]))
    assert found.tolist() == [[False] * 4 + [True, True, True, False]]


def test_where_nothing_can_be_compared_all_of_the_text_rates() -> None:
    embeds, visual_index, text_rows = torch.ones(1, 6, 4), torch.tensor([[0, 1]]), torch.tensor([[3, 5, -1]])
    expected = [[False, False, False, True, False, True]]
    for number in (1.0, math.nan):
        assert text_raters(embeds * number, visual_index, text_rows).tolist() == expected
    assert text_raters(embeds, torch.full((1, 2), -1), text_rows).tolist() == expected


def test_strided_embeddings() -> None:
    embeds, visual_index, text_rows = case(2, 20, 8, 7)
    turned = embeds.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        text_raters(turned, visual_index, text_rows), text_raters(embeds, visual_index, text_rows)
    )


def test_opcheck() -> None:
    opcheck(torch.ops.gap_kernels.text_raters.default, case(2, 12, 5, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeds": torch.ones(2, 12)}, r"embeds: expected 3 dimensions \[B, Q, C\], got shape \[2, 12\]"),
        ({"embeds": torch.ones(2, 12, 6).int()}, "embeds: expected dtype .*, got"),
        ({"visual_index": torch.ones(2, 5)}, "visual_index: expected dtype torch.int64, got"),
        ({"text_rows": torch.tensor([[12], [0]])}, "text_rows: expected values in -1..11, got 12"),
        ({"visual_index": torch.tensor([[-2], [0]])}, "visual_index: expected values in -1..11, got -2"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    names = ("embeds", "visual_index", "text_rows")
    with pytest.raises(ValueError, match=message):
        text_raters(**dict(zip(names, case(2, 12, 5, 4), strict=True)) | change)
