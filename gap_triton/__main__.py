"""``python -m gap_triton``: the command line, as ``gap-triton``."""

from gap_triton_cli import app

app(prog_name="gap-triton")
