"""What is known about this machine and checkout; it goes into every row."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import gap_triton
from bench.commit import commit, output_of
from bench.record import Machine
from gap_triton.environment import device_name, installed_versions


def machine(device: torch.device) -> Machine:
    """What is known about this machine and checkout."""
    versions = installed_versions()
    return Machine(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
        device=device_name(device),
        driver=_driver() if device.type == "cuda" else "-",
        cpu=_cpu(),
        torch=str(torch.__version__),
        triton=versions["triton"] or "-",
        gap_triton=gap_triton.__version__,
    )


def _driver() -> str:
    lines = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0] if lines else "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
