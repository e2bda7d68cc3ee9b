"""Which commit is measured. Imports nothing large: the check's own process asks, too, and loads no torch."""

from __future__ import annotations

import os
import shutil
import subprocess

from bench import ROOT

COMMIT = "BENCH_COMMIT"
"""Variable that names the commit where the checkout has no .git."""


def commit() -> str:
    """The commit of this checkout, by git or else by the variable; ``"unknown"`` if neither says."""
    found = ""
    if (ROOT / ".git").exists():  # or git would answer for a repository around this folder
        found = output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return found or os.environ.get(COMMIT) or "unknown"


def output_of(*command: str) -> str:
    """What a command prints, or nothing if it isn't there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return result.stdout.strip() if result.returncode == 0 else ""
