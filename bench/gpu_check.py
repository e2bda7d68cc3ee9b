"""Everything that only a GPU can show, in one command: ``make gpu-check``, or ``python -m bench.gpu_check``."""

from __future__ import annotations

import faulthandler
import functools
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import ROOT, cuda, outside, record, steps
from bench.steps import Found, Settings, StepFailed
from gap_triton.environment import default_device, installed_versions

BENCHMARK_SHAPES = "llava-1.5,llava-next,qwen2.5-vl-4k,clip-336"
BENCHMARK_ARGUMENTS = (
    "-k",
    "not compiled",
    "--shapes",
    BENCHMARK_SHAPES,
    "--batches",
    "1",
    "--budget",
    "0.1",
)
TINY_BENCHMARK_ARGUMENTS = ("-k", "not compiled", "--shapes", "tiny,tiny-tower", "--budget", "0.01")

LIMITS_S = {
    "kernel-tests": 150.0,
    "gpu-tests": 90.0,
    "benchmarks": 180.0,
    "memcheck": 90.0,
    "racecheck": 90.0,
}
"""Seconds for each step that starts a program, where the budget leaves as many."""

RESERVE_S = 5.0
"""Left for the report when a step is given what remains of the budget."""

HANG_S = 240.0
"""Seconds after which a step counts as hung: the process says where, and ends. Programs that wait for each other on a GPU
can do so for ever, and nothing from outside can interrupt the call that waits for them."""

Step = Callable[[], Found]


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        name: The step.
        status: ``"passed"``, ``"failed"``, or ``"skipped"`` where it can't be done.
        seconds: How long it took.
        message: Why it failed or was skipped.
        found: What it measured or counted.
    """

    name: str
    status: str
    seconds: float
    message: str = ""
    found: Found = field(default_factory=dict)


def all_steps(
    settings: Settings,
    csv: Path,
    remaining_s: Callable[[], float],
    kernel_tests: Sequence[str] = outside.KERNEL_TESTS,
    gpu_tests: Sequence[str] = outside.GPU_TESTS,
    benchmark_arguments: Sequence[str] = BENCHMARK_ARGUMENTS,
) -> dict[str, Step]:
    """The steps by name, in order.

    Args:
        settings: How much is done.
        csv: Where the microbenchmarks add their rows.
        remaining_s: Seconds left; steps that start programs are ended in time.
        kernel_tests: Arguments of pytest.
        gpu_tests: Likewise.
        benchmark_arguments: Further arguments of the microbenchmarks.
    """

    def limit(name: str) -> float:
        left = remaining_s() - RESERVE_S
        if left < RESERVE_S:
            raise outside.NotAvailable("no time is left; raise --budget")
        return min(LIMITS_S[name], left)

    def on(step: Callable[[Settings], Found]) -> Step:
        return functools.partial(step, settings)

    timed = ("--device", str(settings.device), *benchmark_arguments)
    return {
        "machine": on(steps.measure_machine),
        "float64": on(steps.compare_with_float64),
        "kernel-tests": lambda: outside.run_tests(kernel_tests, limit("kernel-tests")),
        "gpu-tests": lambda: outside.run_tests(gpu_tests, limit("gpu-tests")),
        "relaunch": on(steps.relaunch),
        "streams": on(steps.run_on_streams),
        "graphs": on(steps.replay_graphs),
        "host": on(steps.time_the_host),
        "benchmarks": lambda: outside.run_benchmarks(timed, csv, limit("benchmarks")),
        "memcheck": lambda: outside.sanitize("memcheck", limit("memcheck")),
        "racecheck": lambda: outside.sanitize("racecheck", limit("racecheck")),
    }


def needs_cuda(device: torch.device) -> Found:
    """Stands for a step that has nothing to do on a CPU."""
    cuda.require_cuda(device, "each of these tests")
    return {}


def attempt(name: str, step: Step, device: torch.device) -> Outcome:
    """Run one step; whatever it raises is its outcome. Its memory is handed back, for the programs that others start."""
    start = time.perf_counter()
    status, message, found = "passed", "", {}
    faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        found = step()
    except (cuda.NeedsCuda, outside.NotAvailable) as error:
        status, message = "skipped", str(error)
    except StepFailed as error:
        status, message, found = "failed", str(error), error.found
    except Exception as error:  # the other steps still have something to say
        status, message = "failed", f"{type(error).__name__}: {error}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    gc.collect()
    cuda.release(device)
    return Outcome(name, status, time.perf_counter() - start, message, found)


def write_report(
    path: Path,
    device: torch.device,
    outcomes: Sequence[Outcome],
    running: str | None = None,
    complete: bool = False,
) -> None:
    """Write what is known so far, so that a run that is cut off leaves something."""
    report: dict[str, Any] = {
        **asdict(record.machine(device)),
        "versions": installed_versions(),
        "complete": complete,
        "running": running,
        "failed": [outcome.name for outcome in outcomes if outcome.status == "failed"],
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def brief(outcome: Outcome) -> str:
    """One line that says the most important thing a step found."""
    if outcome.message:
        return outcome.message if len(outcome.message) < 300 else outcome.message[:300] + " ..."
    found = outcome.found
    if outcome.name == "machine":
        launch = ", ".join(f"{mode} {us:.1f} us" for mode, us in found["launch_us"].items())
        copy, product = found["copy_tb_per_s"], found["product_tflop_per_s"]
        return f"copy {copy:.3g} TB/s, product {product:.3g} TFLOP/s, launch {launch}"
    if outcome.name == "float64":
        error = found["largest_error"]
        return (
            f"{found['compared']} results, path {found['path']}; largest error {error:.2g} of the mean size"
        )
    if outcome.name == "host":
        return ", ".join(f"{name} {us} us" for name, us in found["host_us"].items())
    if outcome.name == "benchmarks":
        counts = {
            status: sum(goal["status"] == status for goal in found["goals"]) for status in ("met", "missed")
        }
        return f"{len(found['rows'])} rows; goals met {counts['met']}, missed {counts['missed']}" + (
            f"; stopped {found['stopped']}" if "stopped" in found else ""
        )
    return ", ".join(f"{name} {value}" for name, value in found.items() if isinstance(value, (int, str)))


def tables(outcomes: Sequence[Outcome], title: str) -> list[Table]:
    """What is printed last: the goals, where they were judged, and one line per step."""
    printed = []
    verdicts = [goal for outcome in outcomes for goal in outcome.found.get("goals", [])]
    if verdicts:
        goals_table = Table(
            "goal", "where", "status", "measured", "asked", "of the bound", title="Goals, not asserted"
        )
        for goal in verdicts:
            number, factor = goal["value"], goal["factor"]
            goals_table.add_row(
                goal["goal"],
                goal["where"],
                goal["status"],
                "-" if number is None else f"{number:.3g}",
                f"{goal['bound']:.3g}",
                "-" if factor is None else f"{factor:.2f}",
            )
        printed.append(goals_table)
    steps_table = Table("step", "status", "s", "found", title=title)
    for outcome in outcomes:
        steps_table.add_row(outcome.name, outcome.status, f"{outcome.seconds:.1f}", brief(outcome))
    return [*printed, steps_table]


def check(
    steps_by_name: dict[str, Step],
    device: torch.device,
    output: Path,
) -> list[Outcome]:
    """Run the steps one after another, report each as it ends, and write the report after each."""
    outcomes: list[Outcome] = []
    for number, (name, step) in enumerate(steps_by_name.items(), start=1):
        print(f"[{number}/{len(steps_by_name)}] {name} ...", flush=True)
        write_report(output, device, outcomes, running=name)
        outcome = attempt(name, step, device)
        outcomes.append(outcome)
        print(f"    {outcome.status} in {outcome.seconds:.1f} s: {brief(outcome)}", flush=True)
        write_report(output, device, outcomes, complete=len(outcomes) == len(steps_by_name))
    return outcomes


STEP_NAMES = tuple(all_steps(steps.tiny(torch.device("cpu")), record.CSV, lambda: 0.0))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def main(
    output: Annotated[
        Path | None,
        typer.Option(
            envvar="GPU_CHECK_OUTPUT",
            help="JSON report. Default: bench/results/gpu-check-DEVICE.json. Rows of a GPU are added to"
            " microbenchmarks.csv beside it.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device to check. Default: the first GPU, else the CPU.")
    ] = None,
    budget: Annotated[
        float,
        typer.Option(min=1, help="Seconds for everything; what no time is left for is skipped."),
    ] = 450.0,
    relaunches: Annotated[
        int, typer.Option(min=1, help="How often prune_tokens is launched again.")
    ] = 10_000,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Run this step only; may be repeated. Of: {', '.join(STEP_NAMES)}."),
    ] = None,
) -> None:
    """Check the kernels on this GPU, time them, and hold the times against the goals.

    Each step is timed and reported; one that fails doesn't stop the others, and the exit status is 1 if any did. A step
    that can't be done here is reported as skipped, never as passed. Goals are reported, never asserted.

    machine: copy bandwidth, matrix rate, launch. float64: every operator at every named shape. kernel-tests, gpu-tests:
    tests/support/kernels_checks.py, and the tests marked gpu. relaunch: prune_tokens thousands of times, same bits. streams:
    several threads, a stream each. graphs: capture, replay on new values, two graphs on two streams. host: time until the
    host has control again. benchmarks: a part of make bench, and the goals. memcheck, racecheck: compute-sanitizer.

    Without a GPU the steps that can run do so on the PyTorch reference and tiny shapes: that tries the script, and shows
    nothing about the kernels.
    """
    start = time.perf_counter()
    unknown = sorted(set(only or ()) - set(STEP_NAMES))
    if unknown:
        raise typer.BadParameter(f"--only {unknown[0]}: expected one of {', '.join(STEP_NAMES)}")
    chosen = torch.device(device) if device else default_device()
    on_gpu = cuda.is_cuda(chosen)
    settings = replace(Settings(chosen) if on_gpu else steps.tiny(chosen), relaunches=relaunches)
    name = re.sub(r"[^a-z0-9]+", "-", record.machine(chosen).device.lower()).strip("-")
    path = output or ROOT / "bench" / "results" / f"gpu-check-{name}.json"
    planned = all_steps(
        settings,
        path.with_name(record.CSV.name) if on_gpu else path.with_suffix(".csv"),
        lambda: budget - (time.perf_counter() - start),
        benchmark_arguments=BENCHMARK_ARGUMENTS if on_gpu else TINY_BENCHMARK_ARGUMENTS,
    )
    if not on_gpu:
        for tests in ("kernel-tests", "gpu-tests"):
            planned[tests] = functools.partial(needs_cuda, chosen)
        print("No GPU: tiny shapes on the PyTorch reference, to try the script. No kernel runs.", flush=True)
    outcomes = check(
        {name: step for name, step in planned.items() if name in (only or planned)}, chosen, path
    )
    console = Console(width=160)
    title = f"{record.machine(chosen).device}, {time.perf_counter() - start:.0f} s, {path}"
    for table in tables(outcomes, title):
        console.print(table)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
