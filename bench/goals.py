"""What the kernels should reach on a GPU, judged from measured rows. A goal that is missed is reported, never asserted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.record import Row


@dataclass(frozen=True)
class Goal:
    """A bound on one number of a row, or on its time beside a rival's.

    Attributes:
        text: What is asked, in words.
        operator: Whose rows it is asked of.
        mode: Of these rows.
        number: ``"launches"``, ``"ratio"`` to the floor, ``"speed-up"`` over ``rival``, or ``"share"`` of its time.
        bound: At most this; for a speed-up, at least.
        rival: Implementation that a speed-up or a share refers to.
    """

    text: str
    operator: str
    mode: str
    number: str
    bound: float
    rival: str = ""


GOALS = (
    Goal("prune_tokens is one launch", "prune_tokens", "graph", "launches", 1),
    Goal("prune_tokens takes at most 1.5 times its floor", "prune_tokens", "graph", "ratio", 1.5),
    Goal(
        "prune_tokens is 5 times as fast as PyTorch, eager",
        "prune_tokens",
        "eager",
        "speed-up",
        5,
        "reference",
    ),
    Goal(
        "prune_tokens is twice as fast as PyTorch, graph", "prune_tokens", "graph", "speed-up", 2, "reference"
    ),
    Goal("prune_tokens is 30 times as fast as FastV's way", "prune_tokens", "graph", "speed-up", 30, "fastv"),
    Goal(
        "importance adds at most 10% to attention",
        "attention, importance",
        "graph",
        "share",
        1.1,
        "triton without",
    ),
    Goal(
        "topk_indices is 3 times as fast as torch.topk + sort",
        "topk_indices",
        "graph",
        "speed-up",
        3,
        "torch.topk + sort",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A goal at one shape.

    Attributes:
        goal: Its text.
        where: Shape and batch; empty if nothing was measured.
        status: ``"met"``, ``"missed"`` or ``"not measured"``.
        value: The number that was measured.
        bound: The number that was asked.
        factor: How far beyond the bound: 1.2 is missed by 20%, 0.8 is met with as much to spare.
    """

    goal: str
    where: str
    status: str
    value: float | None
    bound: float
    factor: float | None


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Hold the rows of the Triton kernels against every goal, at every shape that was measured."""
    verdicts = []
    for goal in GOALS:
        found = [
            verdict
            for row in rows
            if (row.operator, row.mode, row.implementation) == (goal.operator, goal.mode, "triton")
            if (verdict := _judge(goal, row, rows)) is not None
        ]
        verdicts += found or [Verdict(goal.text, "", "not measured", None, goal.bound, None)]
    return verdicts


def _judge(goal: Goal, row: Row, rows: Sequence[Row]) -> Verdict | None:
    """The verdict on one row; None if its rival or its number wasn't measured."""
    rival = next((r for r in rows if r.group == row.group and r.implementation == goal.rival), None)
    if goal.number in ("speed-up", "share"):
        if rival is None:
            return None
        share = row.median_us / rival.median_us
        value: float | None = share if goal.number == "share" else 1 / share
    else:
        value = row.launches if goal.number == "launches" else row.ratio
    if value is None:
        return None
    factor = goal.bound / value if goal.number == "speed-up" else value / goal.bound
    where = f"{row.shape}-b{row.batch}"
    return Verdict(goal.text, where, "met" if factor <= 1 else "missed", value, goal.bound, factor)
