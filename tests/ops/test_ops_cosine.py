"""The cosine to the text: against loops in Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import text_cosine
from support.naive.cosine import assert_cosines
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
    "sizes", [(1, 2, 1, 1), (2, 12, 5, 4), (3, 70, 33, 17), (2, 40, 3, 35), (1, 9, 0, 4), (2, 9, 4, 0)]
)
@pytest.mark.parametrize("channels", [0, 6, 130])
def test_against_loops(sizes: tuple[int, int, int, int], channels: int) -> None:
    embeds, visual_index, text_rows = case(*sizes, channels)
    assert_cosines(text_cosine(embeds, visual_index, text_rows), embeds, visual_index, text_rows)


def test_by_hand() -> None:
    """Words (1, 0) and (0, 1) have their mean in the middle; what is filler or 0 has no cosine."""
    embeds = torch.tensor([[[1.0, 0], [0, 1], [3, 3], [-2, -2], [5, 0], [0, 0]]])
    found = text_cosine(embeds, torch.tensor([[2, 3, -1, 4, 5]]), torch.tensor([[0, -1, 1]]))
    expected = torch.tensor([[1.0, -1.0, 0.0, math.sqrt(0.5), 0.0]])
    torch.testing.assert_close(found, expected)


def test_what_is_not_named_plays_no_part() -> None:
    embeds, visual_index, text_rows = case(2, 12, 5, 4)
    spoiled = torch.full_like(embeds, math.nan)
    for sample in range(2):
        named = torch.cat([visual_index[sample], text_rows[sample]])
        named = named[named >= 0]
        spoiled[sample, named] = embeds[sample, named]
    found = text_cosine(spoiled, visual_index, text_rows)
    assert torch.equal(found, text_cosine(embeds, visual_index, text_rows))


def test_nan_spoils_its_token_and_in_the_text_its_sample() -> None:
    embeds, visual_index, text_rows = (
        torch.ones(2, 6, 4),
        torch.tensor([[0, 1]] * 2),
        torch.tensor([[3, 5]] * 2),
    )
    embeds[0, 1, 2] = embeds[1, 5, 0] = math.nan
    assert text_cosine(embeds, visual_index, text_rows).isnan().tolist() == [[False, True], [True, True]]


def test_strided_embeddings() -> None:
    embeds, visual_index, text_rows = case(2, 20, 8, 7)
    turned = embeds.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        text_cosine(turned, visual_index, text_rows), text_cosine(embeds, visual_index, text_rows)
    )


def test_opcheck() -> None:
    opcheck(torch.ops.gap_kernels.text_cosine.default, case(2, 12, 5, 4))


def test_backward_is_refused() -> None:
    embeds, visual_index, text_rows = case(2, 12, 5, 4)
    with pytest.raises(RuntimeError, match=r"gap_kernels\.text_cosine has no gradient"):
        text_cosine(embeds.requires_grad_(), visual_index, text_rows).sum().backward()


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
        text_cosine(**dict(zip(names, case(2, 12, 5, 4), strict=True)) | change)
