"""Reading a prompt, in loops."""

from __future__ import annotations

from typing import Any, NamedTuple


class Sample(NamedTuple):
    """Visual rows, ranking rows (the last row where there are none), the last row, and the five counts."""

    visual: list[int]
    text: list[int]
    last_row: int
    counts: list[int]


def read(visual: list[bool], real: list[bool], answer: list[bool], rankers: list[bool] | None) -> Sample:
    """Read one sample."""
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
    return Sample(visual_rows, text or [last_row], last_row, counts)


def read_each(
    visual: Any, real: Any, answer: Any | None, rankers: Any | None, index: list[list[int]] | None
) -> list[Sample]:
    """Read every sample of masks [B, Q], as nested lists; of the rows ``index`` alone where it is given."""

    def taken(mask: Any, sample: int) -> list[bool]:
        left = range(len(mask[sample])) if index is None else index[sample]
        return [row >= 0 and bool(mask[sample][row]) for row in left]

    def none(sample: int) -> list[bool]:
        return [False] * len(visual[sample] if index is None else index[sample])

    return [
        read(
            taken(visual, sample),
            taken(real, sample),
            none(sample) if answer is None else taken(answer, sample),
            None if rankers is None else taken(rankers, sample),
        )
        for sample in range(len(visual))
    ]


def assert_reads(found: Any, expected: list[Sample]) -> None:
    """Compare what `gap_kernels.read_prompt` found."""
    num_visual, num_text = found.visual_index.shape[1], found.text_rows.shape[1]
    assert found.visual_index.tolist() == [_filled(each.visual, num_visual) for each in expected]
    assert found.text_rows.tolist() == [_filled(each.text, num_text) for each in expected]
    assert found.last_row.tolist() == [[each.last_row] for each in expected]
    assert found.counts.T.tolist() == [each.counts for each in expected]
    for sample, each in enumerate(expected):
        assert found.visual[sample].nonzero().flatten().tolist() == each.visual
        assert found.text[sample].nonzero().flatten().tolist() == (each.text if each.counts[2] else [])
        assert int(found.real[sample].sum()) == each.counts[1]


def _filled(rows: list[int], width: int) -> list[int]:
    return (rows + [-1] * width)[:width]
