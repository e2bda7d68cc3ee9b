"""What ``gap-triton run`` asks: the options of the command, or a file with one question a line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .parse import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Question:
    """One prompt and what it is about.

    Attributes:
        prompt: The question.
        images: Image files, in the order of their tokens in the prompt.
        videos: Video files, or folders of frames whose names are in order.
        where: What a refusal calls it, "" for that of the command line.
        fields: Other fields of its line, which go to its answer.
    """

    prompt: str
    images: tuple[Path, ...]
    videos: tuple[Path, ...] = ()
    where: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    def open_images(self) -> list[Image]:
        """Read the images, as RGB."""
        return [open_image(path, f"{self.where}--image") for path in self.images]

    def open_videos(self) -> list[list[Image] | str]:
        """Read the frames of folders; a file stays its path, for the processor to decode."""
        return [
            [open_image(frame, f"{self.where}--video") for frame in frames_of(video)]
            if video.is_dir()
            else str(video)
            for video in self.videos
        ]

    def check(self) -> None:
        """Refuse what can't be asked, before a model is loaded.

        Raises:
            BadParameter: The prompt is empty, there is nothing to look at, or a file can't be read.
        """
        if not self.prompt.strip():
            raise typer.BadParameter(
                f"{self.where}--prompt {self.prompt!r}: expected a question or a request, in words"
            )
        if not self.images and not self.videos:
            raise typer.BadParameter(f"{self.where}give --image or --video, to say what to look at")
        for path in (*self.images, *self.videos):
            if not path.exists():
                raise typer.BadParameter(f"{self.where}file {str(path)!r} does not exist")
        self.open_images()
        for video in self.videos:
            if video.is_dir() and not frames_of(video):
                raise typer.BadParameter(
                    f"{self.where}--video {str(video)!r}: a folder has to hold frames ({', '.join(FRAME_SUFFIXES)})"
                )


def frames_of(folder: Path) -> list[Path]:
    """The images in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES)


def read_questions(file: Path, prompt: str | None) -> list[Question]:
    """Read ``--input``: a JSON object a line, with ``image`` or ``video`` (a file or a list), and ``prompt``.

    Args:
        file: The file. Relative names in it count from its folder.
        prompt: What to ask where a line has no prompt.

    Raises:
        BadParameter: A line is no such object; it says which.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--input {str(file)!r} can't be read: {error}") from error
    questions = [
        read_line(line, f"--input {str(file)!r}, line {number}: ", file.parent, prompt)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not questions:
        raise typer.BadParameter(f"--input {str(file)!r} is empty: expected a JSON object a line")
    return questions


def read_line(line: str, where: str, folder: Path, prompt: str | None) -> Question:
    """Read one line of ``--input``."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{where}expected a JSON object, got {line[:60]!r} ({error})") from error
    if not isinstance(fields, dict):
        raise typer.BadParameter(f"{where}expected a JSON object, got {line[:60]!r}")
    text = fields.pop("prompt", prompt)
    if not isinstance(text, str):
        raise typer.BadParameter(f"{where}expected a prompt, as a string, here or by --prompt")
    images, videos = (files_of(fields.pop(name, []), name, where, folder) for name in ("image", "video"))
    return Question(text, images, videos, where, fields)


def files_of(value: Any, name: str, where: str, folder: Path) -> tuple[Path, ...]:
    """Read the files of one field: a name or a list of names."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise typer.BadParameter(f"{where}{name}={value!r}: expected a file or a list of files")
    return tuple(folder / each for each in names)
