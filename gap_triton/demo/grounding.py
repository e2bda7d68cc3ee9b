"""Boxes, the location tokens that write them down, and the accuracy of real, greedy generation.

Boxes are ``x0 y0 x1 y1`` as shares of the image's width and height, so 0..1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .architectures import ARCHITECTURES
from .scenes import IMAGE_SIZE, Scenes
from .vocabulary import LOCATION_TOKENS, LOCATIONS, token_id

_ANSWER = re.compile(r"\s*".join([r"<loc(\d\d)>"] * 4))


def location_ids(boxes: Tensor) -> Tensor:
    """Return the token ids that write down boxes: float [..., 4] in 0..1 to [..., 4] int64."""
    if boxes.shape[-1:] != (4,):
        raise ValueError(f"boxes has shape {list(boxes.shape)}; the last dimension must be 4")
    if boxes.numel() and not (boxes.min() >= 0 and boxes.max() <= 1):
        raise ValueError(
            f"boxes spans {boxes.min():g}..{boxes.max():g}; it must lie in 0..1, shares of the image"
        )
    return (boxes * (LOCATIONS - 1)).round().long() + token_id(LOCATION_TOKENS[0])


def boxes_from_tokens(answers: Sequence[str]) -> Tensor:
    """Read boxes from decoded answers such as ``"<loc02> <loc05> <loc09> <loc12>"``: [N, 4] float32.

    The first four location tokens in a row count. An answer without them gives NaN, whose IoU with any box is 0.
    """
    boxes = torch.full((len(answers), 4), float("nan"))
    for box, answer in zip(boxes, answers, strict=True):
        if match := _ANSWER.search(answer):
            box.copy_(torch.tensor([int(number) for number in match.groups()]) / (LOCATIONS - 1))
    return boxes


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union of matching boxes: two float [..., 4] to [...].

    A box without area, or with a NaN in it, gives 0.
    """
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (first, second)]
    return (shared / (areas[0] + areas[1] - shared).clamp(min=1e-12)).nan_to_num(0.0)


def prompt(question: str, processor: Any) -> str:
    """Return the prompt for one question about one image, as the model of ``processor`` was trained on."""
    known = {architecture.image_token: architecture for architecture in ARCHITECTURES.values()}
    if processor.image_token not in known:
        raise ValueError(
            f"processor has the image token {processor.image_token!r}; the embedded models have {', '.join(known)}"
        )
    return known[processor.image_token].prompt(question)


def prepare(processor: Any, scenes: Scenes) -> Any:
    """Return the model inputs for each scene's question: processed images and prompts, padded to one length."""
    indices = range(len(scenes))
    return processor(
        images=[scenes.image(i) for i in indices],
        text=[prompt(scenes.question(i), processor) for i in indices],
        padding=True,
        return_tensors="pt",
    )


class BoxComplete(StoppingCriteria):
    """Ends an answer with its fourth location token in a row: no later token can change the box that is read from it."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which of the rows of ``input_ids`` [N, L] end in a box, [N] bool."""
        first = token_id(LOCATION_TOKENS[0])
        last = input_ids[:, -4:]
        return ((last >= first) & (last < first + LOCATIONS)).all(dim=1)


def answer_boxes(model: Any, processor: Any, scenes: Scenes) -> Tensor:
    """Ask each scene's question by greedy ``generate``: the answered boxes, [N, 4] float32, NaN = no box."""
    return _answer_boxes(model, processor, prepare(processor, scenes).to(model.device))


@torch.no_grad()
def _answer_boxes(model: Any, processor: Any, inputs: Any) -> Tensor:
    criteria = StoppingCriteriaList([BoxComplete()])
    generated = model.generate(**inputs, do_sample=False, stopping_criteria=criteria)
    answers = generated[:, inputs["input_ids"].shape[1] :]
    return boxes_from_tokens(processor.batch_decode(answers, skip_special_tokens=True))


@dataclass(frozen=True)
class Batch:
    """Scenes as a model takes them.

    Attributes:
        inputs: What `prepare` makes of them, on the model's device.
        boxes: The boxes asked for, [N, 4] float32.
    """

    inputs: Any
    boxes: Tensor


def batches_of(processor: Any, scenes: Scenes, device: torch.device, batch_size: int = 64) -> Iterator[Batch]:
    """Yield scenes in batches of at most ``batch_size``, prepared: a list of them serves any number of evaluations."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    for start in range(0, len(scenes), batch_size):
        part = scenes[start : start + batch_size]
        yield Batch(prepare(processor, part).to(device), part.target_boxes / IMAGE_SIZE)


def evaluate(
    model: Any,
    processor: Any,
    scenes: Scenes,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """Compare the answers to the scenes' questions with the true boxes.

    Args:
        model: An embedded model, from ``AutoModelForImageTextToText.from_pretrained``, pruned or not.
        processor: The processor of that model.
        scenes: The scenes to ask about.
        batch_size: Scenes per call of ``generate``.
        progress: Called after every batch with the number of scenes in it.

    Returns:
        IoU of each answer with the true box, [N] float32; an answer that is no box counts as 0.
    """
    return evaluate_batches(
        model, processor, batches_of(processor, scenes, model.device, batch_size), progress=progress
    )


def evaluate_batches(
    model: Any,
    processor: Any,
    batches: Iterable[Batch],
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> Tensor:
    """Compare answers as `evaluate` does, of scenes that `batches_of` has prepared."""
    ious = []
    for batch in batches:
        ious.append(box_iou(_answer_boxes(model, processor, batch.inputs), batch.boxes))
        progress(len(batch.boxes))
    return torch.cat(ious)
