"""How a command ends when it can't be done: one sentence and exit status 2, no traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import typer
from typer.core import TyperGroup

OURS = ("gap_triton", "gap_kernels", "gap_triton_cli")
PIP_NAMES = {"PIL": "pillow"}


def first_sentence(error: BaseException) -> str:
    """What went wrong, without the advice and the lists that transformers adds in further lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


@contextmanager
def told_as_option(option: str | None = None) -> Iterator[None]:
    """Let what is refused inside end the command with the option, where one is to blame, and the sentence alone."""
    try:
        yield
    except (OSError, ValueError) as error:
        sentence = first_sentence(error)
        raise typer.BadParameter(f"{option}: {sentence}" if option else sentence) from error


def name_of_missing(error: ImportError) -> str | None:
    """What pip calls the package that was not found, None where the error is about something else, such as a version."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name is None:
        # Transformers has a text for each library that it may need: "X requires the Torchvision library but it was not ..."
        match = re.search(r"requires the (\S+) library", str(error))
        if match is None:
            return None
        return PIP_NAMES.get(match[1], match[1].lower())
    top = name.split(".")[0]
    return PIP_NAMES.get(top, top)


def missing(command: str, error: ImportError) -> str:
    """One sentence that names the package that ``command`` needs, and how to install it."""
    # What transformers can't import, it reports by the name that it was to import; the cause tells why.
    causes = [error, *causes_of(error)]
    name = next(
        (package for each in causes if isinstance(each, ImportError) and (package := name_of_missing(each))),
        None,
    )
    if name is None:
        because = f" ({first_sentence(causes[-1])})" if len(causes) > 1 else ""
        return f"{command}: {first_sentence(error)}{because}"
    sentence = f"{command} needs {name} for this, and it is not installed: pip install {name}"
    if name == "torchvision":
        # The index has the one for CUDA alone, which can't be imported beside another torch.
        sentence += f", the build that goes with torch {version('torch')}, as https://pytorch.org/get-started/locally says"
    return sentence


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """What ``error`` was raised from, the first cause last."""
    while error.__cause__ is not None:
        error = error.__cause__
        yield error


class Commands(TyperGroup):
    """The commands; a package that one of them lacks is told in a sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that ``ctx`` names."""
        try:
            return super().invoke(ctx)
        except ImportError as error:
            if (error.name or "").split(".")[0] in OURS:
                raise  # a mistake here, or an installation that is broken
            typer.echo(missing(f"{ctx.info_name} {ctx.invoked_subcommand}", error), err=True)
            raise typer.Exit(2) from error
