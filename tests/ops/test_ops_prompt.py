"""Reading a prompt: against loops in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gap_kernels import read_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

IMAGE, VIDEO, PAD = 7, 9, 0


def naive(
    visual: list[bool], real: list[bool], answer: list[bool], rankers: list[bool] | None
) -> tuple[list[int], list[int], int, list[int]]:
    """Visual rows, ranking rows, last row and counts of one sample."""
    rows = range(len(visual))
    visual_rows = [row for row in rows if visual[row] and real[row]]
    prompt = [row for row in rows if real[row] and not answer[row]]
    behind = max(visual_rows, default=-1)
    if rankers is None:
        text = [row for row in prompt if row > behind and not visual[row]]
    else:
        text = [row for row in rows if rankers[row] and real[row]]
    last_row = max(prompt, default=0)
    ends = [row for row in visual_rows if row == rows[-1] or answer[row + 1]]
    counts = [len(visual_rows), sum(real), len(text), int(bool(ends)), int(real[-1])]
    return visual_rows, text or [last_row], last_row, counts


def filled(rows: list[int], width: int) -> list[int]:
    return (rows + [-1] * width)[:width]


def assert_reads(found: Any, expected: list[tuple[list[int], list[int], int, list[int]]]) -> None:
    widths = found.visual_index.shape[1], found.text_rows.shape[1]
    assert found.visual_index.tolist() == [filled(each[0], widths[0]) for each in expected]
    assert found.text_rows.tolist() == [filled(each[1], widths[1]) for each in expected]
    assert found.last_row.tolist() == [[each[2]] for each in expected]
    assert found.counts.T.tolist() == [each[3] for each in expected]


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

    def taken(values: Tensor, sample: int) -> list[bool]:
        """The values of the rows that are left; False at filler."""
        rows = range(tokens.shape[1]) if case["index"] is None else case["index"][sample]
        return [row >= 0 and bool(values[sample, row]) for row in rows]

    every = torch.ones_like(visual)
    expected = [
        naive(
            taken(visual, sample),
            taken(tokens != PAD if case["padded"] else every, sample),
            taken(torch.zeros_like(visual) if options["answer"] is None else options["answer"], sample),
            None if options["rankers"] is None else taken(options["rankers"], sample),
        )
        for sample in range(len(tokens))
    ]
    assert_reads(found, expected)
    for sample, each in enumerate(expected):
        assert found.visual[sample].nonzero().flatten().tolist() == each[0]
        assert found.text[sample].nonzero().flatten().tolist() == (each[1] if each[3][2] else [])
        assert int(found.real[sample].sum()) == each[3][1]
    known = read_prompt(
        visual if case["by_mask"] else tokens, ids, **options,
        num_visual=max(each[3][0] for each in expected), num_text=max(1, *(each[3][2] for each in expected)),
        counts=found.counts.tolist(),
    )  # fmt: skip
    assert_reads(known, expected)


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
