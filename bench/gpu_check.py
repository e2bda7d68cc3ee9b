"""Everything that only a GPU can show, in one command: ``make gpu-check``, or ``python3 -m bench.gpu_check``.

This process starts the steps, one after another, and never touches the GPU itself: each step is a program in a process
group of its own. What it finds is written to a file of JSON lines as it comes.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import ROOT, commit, outcome, outside, record, report
from bench.benchmark_step import benchmarks
from bench.gpu_tests import GPU_TESTS, KERNEL_TESTS, tests
from bench.outcome import FAILED, SKIPPED, Journal, Outcome
from bench.own_steps import own, said
from bench.sanitizer import sanitizer, small_calls
from bench.step import Step, Task

STEPS = (
    # What could go wrong at the first contact comes first, and what is most worth knowing.
    own("probe", part=1, limit_s=120),
    own("select", part=1, limit_s=60),
    own("tickets", part=1, limit_s=90, interpreted=True),
    own("cooperative", part=1, limit_s=60, interpreted=True),
    own("hand-over", part=1, limit_s=60),
    own("crowded", part=1, limit_s=60, interpreted=True),
    own("one-or-several", part=1, limit_s=120, interpreted=True),
    own("reduce-overhead", part=1, limit_s=90),
    own("end-to-end", part=1, limit_s=180),
    own("end-to-end-graphs", part=1, limit_s=120),
    own("model-graphs", part=1, limit_s=90),
    own("float64", part=1, limit_s=180),
    own("relaunch", part=2, limit_s=60),
    own("streams", part=2, limit_s=60),
    own("graphs", part=2, limit_s=90),
    own("host", part=2, limit_s=45),
    small_calls(part=2, limit_s=90),
    sanitizer("memcheck", part=2, limit_s=60),
    sanitizer("racecheck", part=2, limit_s=60),
    sanitizer("synccheck", part=2, limit_s=60),
    tests("kernel-tests", 2, 150, KERNEL_TESTS),
    tests("gpu-tests", 2, 90, GPU_TESTS),
    benchmarks(part=2, limit_s=180),
)
NAMES = tuple(step.name for step in STEPS)
PARTS = (1, 2)
PART_S = 540.0
"""Seconds of a part: nine minutes."""

RESERVE_S = 5.0
"""Left for the report when a step is given what remains of the budget."""

LEAST_S = 5.0
"""A step that would get less is skipped."""


def attempt(step: Step, task: Task, left_s: float, journal: Journal) -> Outcome:
    """Run one step; what it says goes into the journal at once."""
    reason = step.why_not(task)
    limit_s = min(step.limit_s, left_s - RESERVE_S)
    if not reason and limit_s < min(step.limit_s, LEAST_S):
        reason = "no time is left: raise --budget, or name it with --only"
    if reason:
        return Outcome(step.name, SKIPPED, reason)
    start = time.monotonic()

    def heard(line: str) -> None:
        entry = said(line)
        if entry is not None and "found" in entry:
            journal.write(step=step.name, found=entry["found"])

    # Tiny shapes gain nothing by a second thread, and lose much where others use the processors, too.
    threads = {} if task.on_gpu else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment = {**threads, **step.environment(task)}
    ended = outside.run(step.command(task, limit_s), limit_s, heard, **environment)
    result = step.judge(ended, task)
    if not any(said(line) for line in ended.output.splitlines()):
        for found in result.found:  # the step had no way to say it itself
            journal.write(step=step.name, found=found)
    result.seconds = time.monotonic() - start
    if result.status == FAILED:
        result.output = ended.tail(60)
    return result


def check(steps: Sequence[Step], task: Task, journal: Journal, budget_s: float) -> list[Outcome]:
    """Run the steps one after another, and report each as it ends."""
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for number, step in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {step.name} ...", flush=True)
        journal.write(begins=step.name)
        result = attempt(step, task, budget_s - (time.monotonic() - start), journal)
        journal.ended(result)
        outcomes.append(result)
        print(f"    {result.status} in {result.seconds:.1f} s: {report.brief(result)}", flush=True)
    return outcomes


def find_device() -> str:
    """``"cuda"`` where another process's torch sees a GPU, else ``"cpu"``."""
    ask = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
    ended = outside.run([sys.executable, "-c", ask], 120)
    if ended.status != 0:
        raise typer.BadParameter(f"--device: torch could not say what there is, {ended.how}: {ended.tail()}")
    return ended.tail(1)


def chosen_steps(only: str | None, part: int | None) -> list[Step]:
    """The steps that were asked for, in order."""
    names = [name.strip() for name in only.split(",")] if only else list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"--only {unknown[0]}: expected one of {', '.join(NAMES)}")
    if part not in (None, *PARTS):
        raise typer.BadParameter(f"--part {part}: expected 1 or 2")
    return [step for step in STEPS if step.name in names and part in (None, step.part)]


def print_tables(outcomes: Sequence[Outcome], title: str, on_gpu: bool) -> None:
    """The steps, then whole models, then every goal."""
    console = Console(width=160)
    console.print(report.steps_table(outcomes, title))
    if not on_gpu:
        console.print("No GPU: times are those of a CPU, on tiny shapes. They show that the script runs.")
    models = report.models_table(outcomes, on_gpu)
    if models.rows:
        console.print(models)
    console.print(report.goals_table(report.verdicts(outcomes, on_gpu)))


def print_files(paths: Sequence[Path]) -> int:
    """The tables of files that were written before; 1 if a step failed."""
    runs, outcomes = outcome.read(paths)
    kinds = sorted({(run["commit"], run["device"]) for run in runs})
    title = "; ".join(f"{device}, commit {commit}" for commit, device in kinds)
    print_tables(
        outcomes, title, on_gpu=bool(kinds) and all(device.startswith("cuda") for _, device in kinds)
    )
    return int(any(result.status == FAILED for result in outcomes))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    output: Annotated[
        Path | None,
        typer.Option(
            help="File of JSON lines, which is added to. Default: bench/results/gpu-check-DEVICE-TIME.jsonl. Rows that"
            " a GPU gave are added to microbenchmarks.csv beside it.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu. Default: cuda where there is a GPU.")
    ] = None,
    part: Annotated[
        int | None, typer.Option(help="1 or 2: one of two halves, of nine minutes on a GPU each.")
    ] = None,
    only: Annotated[str | None, typer.Option(help=f"STEP,STEP: these only, of {', '.join(NAMES)}.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Seconds for everything; what no time is left for is skipped. Default: 540 for a part, 1080 for both.",
        ),
    ] = None,
    relaunches: Annotated[
        int | None,
        typer.Option(min=1, help="How often prune_tokens is launched again. Default: 10,000; 25 on a CPU."),
    ] = None,
    commit_hash: Annotated[
        str | None, typer.Option("--commit", help="The commit, where the checkout has no .git.")
    ] = None,
    table: Annotated[
        list[Path] | None, typer.Option(help="Run nothing; print the tables of such a file. May be repeated.")
    ] = None,
) -> None:
    """Check the kernels on this GPU, time them, and hold the times against the goals.

    Each step is a process group of its own with its own limit: one that fails or hangs costs no other. The exit status is 1
    if any failed. A step that can't be done here is reported as skipped, with the reason, never as passed. Goals are
    reported, never asserted.

    Part 1: probe, select, tickets, cooperative, hand-over, crowded (while other streams fill the device), one-or-several
    (launches), reduce-overhead, end-to-end (7B models with random weights), end-to-end-graphs, model-graphs, float64.
    Part 2: relaunch, streams, graphs, host, small-calls, memcheck, racecheck, synccheck, kernel-tests, gpu-tests,
    benchmarks.

    Without a GPU the steps run on the PyTorch reference, or in Triton's interpreter, on tiny shapes: that tries the script,
    and shows nothing about speed.
    """
    if table:
        raise typer.Exit(print_files(table))
    steps = chosen_steps(only, part)
    if commit_hash:
        os.environ[commit.COMMIT] = commit_hash
    start = time.monotonic()
    now = datetime.now(timezone.utc)
    found = device or find_device()
    path = output or ROOT / "bench" / "results" / f"gpu-check-{found}-{now:%Y%m%d-%H%M%S}.jsonl"
    journal = Journal(path)
    budget_s = budget or PART_S * (1 if part else len(PARTS))
    journal.write(
        run={
            "date": now.isoformat(timespec="seconds"),
            "commit": commit.commit(),
            "device": found,
            "steps": [step.name for step in steps],
            "budget_s": budget_s,
            "load": os.getloadavg(),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        on_gpu = found.startswith("cuda")
        csv = path.with_name(record.CSV.name) if on_gpu else path.with_suffix(".csv")
        task = Task(found, csv, len(record.read(csv)), Path(folder) / "junit.xml", relaunches)
        if not on_gpu:
            print("No GPU: tiny shapes, on the PyTorch reference or in Triton's interpreter.", flush=True)
        left = budget_s - (time.monotonic() - start)
        outcomes = check(steps, task, journal, left)
    seconds = time.monotonic() - start
    journal.write(
        ended={
            "seconds": round(seconds, 1),
            "failed": [result.step for result in outcomes if result.status == FAILED],
            "skipped": [result.step for result in outcomes if result.status == SKIPPED],
        }
    )
    print_tables(outcomes, f"{found}, commit {commit.commit()}, {seconds:.0f} s, {path}", on_gpu)
    if any(result.status == FAILED for result in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what runs is ended
    app()
