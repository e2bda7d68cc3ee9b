"""What the RefCOCO tasks here ask, and how their answers are handed to lmms-eval's own metrics.

Its tasks ask every model for shares of the image. Here a model is asked in its own words, sees the image as it was trained
to, and what it writes is turned into shares of the image first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lmms_eval.tasks.refcoco import utils_rec
from PIL import Image

from ..evaluation.asking import background_of
from ..evaluation.boxes import BoxFormat, View, resized_by


@dataclass(frozen=True)
class Asked:
    """The model that this process evaluates.

    Attributes:
        format: How it is asked for a box.
        image_processor: What scales its images; None = unknown.
    """

    format: BoxFormat
    image_processor: Any


_asked: list[Asked] = []


def remember(asked: Asked) -> None:
    """Say which model is evaluated."""
    _asked[:] = [asked]
    _resized.cache_clear()


def current() -> Asked:
    """Return the model that is evaluated.

    Raises:
        ValueError: None was built by ``--model gap_triton``, or it is not known how it writes a box.
    """
    if not _asked:
        raise ValueError(
            "these tasks ask a model in its own format: expected --model gap_triton, with format=NAME among --model_args "
            "where the type of the model does not tell"
        )
    return _asked[0]


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Return the image as the model is to see it."""
    asked = current()
    return [asked.format.prepare(doc["image"].convert("RGB"), background_of(asked.image_processor))]


def doc_to_text(doc: dict[str, Any]) -> str:
    """Return the question about one expression."""
    return current().format.question.replace("{}", doc["answer"])


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Return lmms-eval's metrics for an answer, and whether it has no box."""
    asked = current()
    width, height = doc["image_width"], doc["image_height"]
    resized = _resized(width, height) if asked.format.frame == "resized" else None
    box = asked.format.read(results[0] if results else "", View(width, height, resized))
    shares = [0.0] * 4
    # Lmms-eval divides by the union: a box without area is none to it.
    if box is not None and box[2] > box[0] and box[3] > box[1]:
        shares = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
    written = f"[{', '.join(f'{share:.12f}' for share in shares)}]"  # its parser knows no exponents
    metrics = utils_rec.refcoco_bbox_rec_process_result(doc, [written])
    return {**metrics, "gap_no_box": float(box is None)}


@functools.cache
def _resized(width: int, height: int) -> tuple[int, int] | None:
    """Width and height to which the processor scales an image of that size."""
    processor = current().image_processor
    output = processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
    return resized_by(output, processor.patch_size, 0)
