"""The command ``gap-triton``, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from gap_triton_cli import app


def cli(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "500", "TERM": "dumb"})
