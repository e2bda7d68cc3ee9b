"""The Triton kernels compiled ahead of time, for GPUs that aren't there: what they need. Half of the time of all tests.

In a file of its own, so that it runs beside the interpreter's; in a process of its own, as the interpreter can't be where
the compiler is.
"""

from __future__ import annotations

from pathlib import Path

from support.processes import run_pytest


def test_ahead_of_time_compilation(tmp_path: Path) -> None:
    run_pytest(["scripts/kernels_aot.py"], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
