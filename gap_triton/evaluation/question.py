"""One question about one image, whatever data set it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from .boxes import Box


@dataclass(frozen=True)
class Question:
    """A question and its right answer: a box, or words.

    Attributes:
        id: Names it within its data set and split, the same at every reading.
        text: The expression that names a thing, for a box; else the question.
        load: Reads the image, as RGB.
        box: The true box x0, y0, x1, y1 in pixels of the image; None where words are asked for.
        answers: Words that are right; empty where a box is asked for.
    """

    id: str
    text: str
    load: Callable[[], Image.Image]
    box: Box | None = None
    answers: tuple[str, ...] = ()
