"""The command line: ``gap-triton demo | run | methods | eval | bench | info``, a file for each command."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .bench import bench
from .demo import demo
from .evaluate import evaluate
from .info import info
from .methods import methods
from .refuse import Commands
from .run import run

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(run)
app.command()(methods)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(info)


def show_version(show: bool) -> None:
    """Print the version and end, for ``--version``."""
    if show:
        try:
            number = version("gap-triton")
        except PackageNotFoundError:  # a checkout on the path
            from gap_triton import __version__ as number
        typer.echo(f"gap-triton {number}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Prune visual tokens of vision-language models and keep every survivor's own position id."""
