"""Reading a prompt: against loops in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gap_kernels import read_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from support.naive import prompt as naive
from torch.library import opcheck

IMAGE, VIDEO, PAD = 7, 9, 0


@st.composite
def prompts(draw: Any) -> dict[str, Any]:
    """Rows of every kind, in any order; maybe fewer of them left."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    row = st.lists(st.sampled_from([PAD, 1, 2, IMAGE, VIDEO]), min_size=length, max_size=length)
    tokens = [draw(row) for _ in range(batch)]
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    left = st.lists(
        st.integers(-1, length - 1),
        min_size=1,
        max_size=length,
        unique_by=lambda x: x if x >= 0 else object(),
    )
    kept = [sorted(draw(left)) for _ in range(batch)] if draw(st.booleans()) else None
    width = 0 if kept is None else max(map(len, kept))
    return {
        "tokens": tokens,
        "by_mask": draw(st.booleans()),
        "padded": draw(st.booleans()),
        "answer": [draw(flags) for _ in range(batch)] if draw(st.booleans()) else None,
        "rankers": [draw(flags) for _ in range(batch)] if draw(st.booleans()) else None,
        "index": None if kept is None else [[-1] * (width - len(each)) + each for each in kept],
    }


@settings(max_examples=150, deadline=None)
@given(prompts())
def test_against_loops(case: dict[str, Any]) -> None:
    tokens = torch.tensor(case["tokens"])
    visual = (tokens == IMAGE) | (tokens == VIDEO)
    options = {
        "attention_mask": (tokens != PAD).long() if case["padded"] else None,
        **{
            name: None if case[name] is None else torch.tensor(case[name])
            for name in ("answer", "rankers", "index")
        },
    }
    ids = () if case["by_mask"] else (VIDEO, IMAGE)
    found = read_prompt(visual if case["by_mask"] else tokens, ids, **options)

    real = tokens != PAD if case["padded"] else torch.ones_like(visual)
    masks = visual.tolist(), real.tolist(), case["answer"], case["rankers"]
    expected = naive.read_each(*masks, case["index"])
    naive.assert_reads(found, expected)
    known = read_prompt(
        visual if case["by_mask"] else tokens, ids, **options,
        num_visual=max(each.counts[0] for each in expected), num_text=max(1, *(each.counts[2] for each in expected)),
        counts=found.counts.tolist(),
    )  # fmt: skip
    naive.assert_reads(known, expected)


TOKENS = torch.tensor([[1, IMAGE, IMAGE, 2, 3], [PAD, 1, IMAGE, 4, IMAGE]])


def test_one_prompt_by_hand() -> None:
    rows = read_prompt(TOKENS, [IMAGE], attention_mask=(TOKENS != PAD).float(), num_visual=2, num_text=2)
    assert rows.visual_index.tolist() == [[1, 2], [2, 4]]
    assert rows.text_rows.tolist() == [[3, 4], [4, -1]]  # the second has no text behind its image
    assert rows.counts.tolist() == [[2, 2], [5, 4], [2, 0], [0, 1], [1, 1]]


def test_strided_arguments() -> None:
    wide = torch.stack([TOKENS, TOKENS + 1], dim=-1)
    masks = {
        "attention_mask": (wide != PAD)[..., 0],
        "answer": torch.tensor([False] * 4 + [True]).expand(2, -1),
    }
    for found, expected in zip(
        read_prompt(wide[..., 0], [IMAGE], **masks),
        read_prompt(TOKENS, [IMAGE], **{name: mask.contiguous() for name, mask in masks.items()}),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool) -> None:
    mask = TOKENS != PAD
    masks = (mask, ~mask, mask, torch.tensor([[-1, 0, 3], [1, 2, 4]])) if full else (None,) * 4
    arguments = (TOKENS, [IMAGE], *masks, 3, 5, None)
    opcheck(torch.ops.gap_kernels.read_prompt.default, arguments)
    opcheck(torch.ops.gap_kernels.read_prompt.default, (TOKENS == IMAGE, [], *masks, 3, 5, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": TOKENS.int()}, "tokens: expected dtype torch.int64 or torch.bool, got .*int32"),
        ({"tokens": TOKENS[:, :0]}, "tokens: expected at least one row, got shape"),
        (
            {"placeholders": [1, 2, 3, 4, 5]},
            r"placeholders: expected at most 4 ids >= 0, got \[1, 2, 3, 4, 5\]",
        ),
        ({"placeholders": [-1]}, r"placeholders: expected at most 4 ids >= 0, got \[-1\]"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask: expected .* with Q = 5, got"),
        ({"answer": torch.ones(2, 5)}, "answer: expected dtype torch.bool, got"),
        ({"index": torch.tensor([[0, 5], [0, 1]])}, r"index: expected values in -1..4, got 5"),
        ({"num_visual": 1}, "num_visual: expected at least 2, the most in a sample, got 1"),
        ({"num_text": 1}, "num_text: expected at least 2, the most in a sample, got 1"),
        ({"num_text": 0}, "num_text: expected at least 1, got 0"),
        ({"counts": [[2, 2]]}, "counts: expected 5 rows of 2 ints, got"),
        (
            {"counts": [[2, 3], [5, 5], [2, 0], [0, 1], [1, 1]]},
            r"counts: expected \[2, 2\] for the number of visual tokens, by sample, got \[2, 3\]",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt(**{"tokens": TOKENS, "placeholders": [IMAGE], **arguments})
