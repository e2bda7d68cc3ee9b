"""Microbenchmarks of the operators, and the check of everything that needs a GPU. Not installed; see README.md."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / "kernels"), str(ROOT)]

# What is measured is this checkout, installed or not, whatever else is installed.
sys.path[:0] = [path for path in PATHS if path not in sys.path[:2]]
