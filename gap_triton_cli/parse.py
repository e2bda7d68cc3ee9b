"""Values of options: shares and counts, lists, image files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from PIL.Image import Image


def parse_keep(text: str, option: str = "--keep") -> float | int:
    """Read ``option``: ``"64"`` is a count, ``"0.25"`` and ``"1.0"`` are shares."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{option} {text!r}: expected a share such as 0.25 or a count such as 64"
        ) from None


def parse_layers(text: str) -> list[int]:
    """Read ``--layers``."""
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--layers {text!r}: expected comma-separated ints such as -1,0,1") from None


def parse_numbers(option: str, text: str) -> list[float]:
    """Read ``option``: comma-separated numbers, each once."""
    try:
        return list(dict.fromkeys(float(number) for number in text.split(",")))
    except ValueError:
        raise typer.BadParameter(
            f"{option} {text!r}: expected comma-separated numbers such as 1,2,4"
        ) from None


def split(text: str) -> list[str]:
    """Items of a comma-separated list, each once."""
    return list(dict.fromkeys(item.strip() for item in text.split(",")))


def split_names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """Read ``option``: ``"all"``, or comma-separated ones of ``known``."""
    names = list(known) if text == "all" else split(text)
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option} {name!r}: expected all, or of {', '.join(known)}")
    return names


def open_image(path: Path, option: str = "--image") -> Image:
    """Read the image of ``option`` to its last pixel, turned as its EXIF data says, as RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # whatever the reader of that format makes of broken bytes, or of a bomb
        raise typer.BadParameter(f"{option} {str(path)!r} can't be read: {error}") from error
