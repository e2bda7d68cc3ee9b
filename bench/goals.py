"""What should be reached on a GPU, judged from what was measured. A goal that is missed is reported, never asserted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.record import Row


@dataclass(frozen=True)
class Measured:
    """A time, and what else was seen of what took it.

    Attributes:
        subject: What was done, such as ``"prune_tokens"`` or ``"prefill"``.
        where: On what, such as ``"llava-1.5-b1"``.
        mode: ``"eager"`` or ``"graph"``.
        way: Who did it: ``"triton"``, ``"pruned"``, or a rival.
        median_us: Microseconds.
        launches: On the device; None where nobody counted.
        ratio: Of the time to its floor; None where there is none.
    """

    subject: str
    where: str
    mode: str
    way: str
    median_us: float
    launches: float | None = None
    ratio: float | None = None


def of_row(row: Row) -> Measured:
    """What a row of the benchmarks says."""
    where = f"{row.shape}-b{row.batch}"
    return Measured(row.operator, where, row.mode, row.implementation, row.median_us, row.launches, row.ratio)


@dataclass(frozen=True)
class Goal:
    """A bound on one number, or on a time beside a rival's.

    Attributes:
        text: What is asked, in words.
        subject: Of what it is asked.
        mode: In which mode.
        number: ``"launches"``, ``"ratio"`` to the floor, ``"speed-up"`` over ``rival``, or ``"share"`` of its time.
        bound: At most this; for a speed-up, at least.
        rival: Way that a speed-up or a share refers to.
        way: Way that is judged.
    """

    text: str
    subject: str
    mode: str
    number: str
    bound: float
    rival: str = ""
    way: str = "triton"


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
    # The rest is 5% for noise.
    Goal("prune_tokens is as fast as by one launch", "prune_tokens", "graph", "share", 1.05, "one launch"),
    Goal(
        "prune_tokens is as fast as by several launches",
        "prune_tokens",
        "graph",
        "share",
        1.05,
        "several launches",
    ),
    Goal(
        "a pruned prefill takes at most 5% longer than the oracle's",
        "prefill",
        "eager",
        "share",
        1.05,
        "oracle",
        "pruned",
    ),
    Goal(
        "a pruned decode step takes at most 5% longer than the oracle's",
        "decode, per token",
        "eager",
        "share",
        1.05,
        "oracle",
        "pruned",
    ),
)


NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Verdict:
    """A goal at one shape.

    Attributes:
        goal: Its text.
        where: On what; empty if nothing was measured.
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


def judge(measured: Sequence[Measured]) -> list[Verdict]:
    """Hold what was measured against every goal, wherever it was measured."""
    verdicts = []
    for goal in GOALS:
        found = [
            verdict
            for ours in measured
            if (ours.subject, ours.mode, ours.way) == (goal.subject, goal.mode, goal.way)
            if (verdict := _judge(goal, ours, measured)) is not None
        ]
        verdicts += found or [Verdict(goal.text, "", NOT_MEASURED, None, goal.bound, None)]
    return verdicts


def _judge(goal: Goal, ours: Measured, measured: Sequence[Measured]) -> Verdict | None:
    """The verdict on one time; None if its rival or its number wasn't measured."""
    here = (ours.subject, ours.where, ours.mode)
    rival = next((r for r in measured if (r.subject, r.where, r.mode, r.way) == (*here, goal.rival)), None)
    if goal.number in ("speed-up", "share"):
        if rival is None:
            return None
        share = ours.median_us / rival.median_us
        value: float | None = share if goal.number == "share" else 1 / share
    else:
        value = ours.launches if goal.number == "launches" else ours.ratio
    if value is None:
        return None
    factor = goal.bound / value if goal.number == "speed-up" else value / goal.bound
    return Verdict(goal.text, ours.where, "met" if factor <= 1 else "missed", value, goal.bound, factor)
