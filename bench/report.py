"""What the GPU check prints last: its steps, and the goals, each with what was measured and by how much it was missed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from bench.goals import NOT_MEASURED, Measured, Verdict, judge, of_row
from bench.outcome import Found, Outcome
from bench.record import Row

LONGEST = 300
"""Characters of a message in the table."""


def measured_in(outcome: Outcome) -> list[Measured]:
    """The times that a step found."""
    times = []
    for found in outcome.found:
        if "row" in found:
            times.append(of_row(Row(**found["row"])))
        elif "timing" in found:
            timing = found["timing"]
            where = f"{timing['model']}, {timing['visual']} tokens, keep {timing['keep']}"
            times.append(Measured(timing["what"], where, timing["mode"], timing["way"], timing["median_us"]))
    return times


def verdicts(outcomes: Iterable[Outcome], on_gpu: bool) -> list[tuple[str, Verdict]]:
    """Every goal, with the step it was judged by, if any was. What a CPU measured meets no goal and misses none.

    Each step is judged by itself: its ways took turns, those of two steps did not.
    """
    judged = [
        (outcome.step, verdict)
        for outcome in outcomes
        if on_gpu
        for verdict in judge(measured_in(outcome))
        if verdict.status != NOT_MEASURED
    ]
    known = {verdict.goal for _, verdict in judged}
    return [*judged, *(("", verdict) for verdict in judge([]) if verdict.goal not in known)]


def by_how_much(verdict: Verdict) -> str:
    """``"met"``, ``"missed by 20%"`` or ``"not measured"``."""
    if verdict.factor is None or verdict.status != "missed":
        return verdict.status
    return f"missed by {(verdict.factor - 1) * 100:.0f}%"


def goals_table(judged: Sequence[tuple[str, Verdict]]) -> Table:
    """One line per goal and shape."""
    table = Table("goal", "where", "asked", "measured", "outcome", "step", title="Goals, not asserted")
    for step, verdict in judged:
        number = "-" if verdict.value is None else f"{verdict.value:.3g}"
        table.add_row(
            verdict.goal, verdict.where or "-", f"{verdict.bound:.3g}", number, by_how_much(verdict), step
        )
    return table


def models_table(outcomes: Iterable[Outcome], on_gpu: bool) -> Table:
    """One line per model, prompt, share kept and what was timed."""
    title = "Whole models with random weights" + (
        "" if on_gpu else ", tiny ones, on a CPU: not a GPU's times"
    )
    ways = ("unpruned", "pruned", "oracle")
    table = Table("model", "tokens", "keep", "what", *(f"{way}, ms" for way in ways), "speed-up", title=title)
    lines: dict[tuple[str, ...], dict[str, float]] = {}
    for outcome in outcomes:
        for timing in (found["timing"] for found in outcome.found if "timing" in found):
            key = tuple(str(timing[name]) for name in ("model", "visual", "keep", "what"))
            lines.setdefault(key, {})[timing["way"]] = timing["median_us"] / 1e3
    for key, times in lines.items():
        shown = [f"{times[way]:.3g}" if way in times else "-" for way in ways]
        whole = on_gpu and {"unpruned", "pruned"} <= times.keys()
        table.add_row(*key, *shown, f"{times['unpruned'] / times['pruned']:.2f}" if whole else "-")
    return table


def steps_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """One line per step."""
    table = Table("step", "status", "s", "found", title=title)
    for outcome in outcomes:
        table.add_row(outcome.step, outcome.status, f"{outcome.seconds:.1f}", brief(outcome))
    return table


def brief(outcome: Outcome) -> str:
    """One line that says why a step did not pass, or how much it found."""
    if outcome.message:
        return outcome.message if len(outcome.message) < LONGEST else outcome.message[:LONGEST] + " ..."
    rows = sum("row" in found or "timing" in found for found in outcome.found)
    if rows:
        return f"{rows} times"
    return "; ".join(filter(None, map(_shown, outcome.found[-2:])))


def _shown(found: Found) -> str:
    simple = {name: value for name, value in found.items() if isinstance(value, (int, float, str))}
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in simple.items()
    )
