"""Tests of the Triton kernels in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def run_pytest(arguments: list[str], **environment: str) -> None:
    """Run pytest in a new process and fail with its output if it fails."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *arguments]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
