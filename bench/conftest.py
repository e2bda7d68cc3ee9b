"""Options of the benchmarks, the cases to run, and the table at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import machine, record, shapes, table
from bench.harness import Bench
from gap_triton.environment import default_device, device_name

CPU_SHAPES = "llava-1.5,clip-336"
GPU_SHAPES = ",".join(shape.name for shape in (*shapes.DECODERS, *shapes.TOWERS))

LONG = 8192
"""Longer prompts are measured at batch 1 unless asked otherwise: one call of the PyTorch reference takes seconds."""

BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gap-triton benchmarks")
    group.addoption("--device", help="Device to measure; default: the first GPU, else the CPU.")
    group.addoption("--csv", type=Path, default=record.CSV, help="File that rows are added to.")
    group.addoption("--budget", type=float, default=0.25, help="Seconds that one measurement may take.")
    group.addoption(
        "--shapes", help=f"Comma-separated, of: {', '.join(shapes.SHAPES)}. Default: all; few on a CPU."
    )
    group.addoption(
        "--batches", help="Comma-separated batch sizes. Default: 1,8, long prompts 1; 1 on a CPU."
    )


def device_of(config: pytest.Config) -> torch.device:
    chosen = config.getoption("device")
    return torch.device(chosen) if chosen else default_device()


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our table says the same per call, with floors and rivals
    device = device_of(config)
    config.stash[BENCH] = Bench(
        device, config.getoption("budget"), config.getoption("csv"), machine.machine(device)
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test the cases of its module's SHAPES that were asked for."""
    if "case" not in metafunc.fixturenames:
        return
    on_gpu = device_of(metafunc.config).type == "cuda"
    names = (metafunc.config.getoption("shapes") or (GPU_SHAPES if on_gpu else CPU_SHAPES)).split(",")
    asked = metafunc.config.getoption("batches")
    batches = (asked or ("1,8" if on_gpu else "1")).split(",")
    try:
        wanted = [shapes.find(name) for name in names]
    except ValueError as error:
        raise pytest.UsageError(f"--shapes: {error}") from None
    cases = [
        shapes.Case(shape, int(batch))
        for shape in wanted
        if shape in metafunc.module.SHAPES
        for batch in (batches if asked or shape.tokens <= LONG else batches[:1])
    ]
    metafunc.parametrize("case", cases, ids=str, scope="module")


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    return request.config.stash[BENCH]


def pytest_terminal_summary(config: pytest.Config) -> None:
    run = config.stash[BENCH]
    console = Console(width=None if os.isatty(1) else 180)
    console.print()
    if run.rows:
        on_gpu = run.device.type == "cuda"
        console.print(table.summary(run.rows, device_name(run.device), on_gpu))
        rates = run.rates
        launches = ", ".join(f"{mode} {us:.1f} us" for mode, us in rates.launch_us.items())
        console.print(
            f"copy {rates.bytes_per_us / 1e6:.3g} TB/s, {run.dtype} product {rates.flops_per_us / 1e6:.3g} TFLOP/s,"
            f" launch: {launches}. {len(run.rows)} rows added to {run.csv}."
        )
    for line in table.skipped(run.skips):
        console.print(line, highlight=False)
