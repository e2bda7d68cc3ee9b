"""The command ``gap-triton``, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from gap_triton_cli import app


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "500", "TERM": "dumb"})


def said(result: Result) -> str:
    """What was printed, out of its frame."""
    return " ".join(result.output.replace("│", " ").split())


def refuses(sentence: str, *arguments: str) -> None:
    """The command ends with status 2 and ``sentence``, and not with a traceback."""
    result = cli(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert sentence in said(result)
    assert "Traceback" not in result.output
