"""A loaded model and what it takes to put questions to it: prompts, images as it expects them, its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from PIL import Image

import gap_triton

from .. import GapConfig
from ..demo.architecture import Architecture
from ..demo.scenes import IMAGE_SIZE
from ..introspect import visual_token_ids
from .boxes import BoxFormat, View, resized_by
from .question import Question
from .vqa import PROMPT

GREY = (0.5, 0.5, 0.5)  # where a processor has no mean


@dataclass(frozen=True)
class Answer:
    """What a model said to one question.

    Attributes:
        text: Its words.
        view: The image that they speak of.
        visual_tokens: Of the prompt.
        kept_tokens: Of these, those that a decoder layer has, mean over all layers.
    """

    text: str
    view: View
    visual_tokens: int
    kept_tokens: float


@dataclass(frozen=True)
class Batch:
    """Inputs of a model for some questions, and the images that they are about."""

    inputs: Any
    views: list[View]


def background_of(image_processor: Any) -> tuple[int, int, int]:
    """Return the colour that padding has: the mean that the processor subtracts, as LLaVA's ``expand2square`` takes it."""
    red, green, blue = (int(255 * each) for each in getattr(image_processor, "image_mean", None) or GREY)
    return red, green, blue


class Asker:
    """Puts questions to one model.

    Args:
        model: A vision-language model of transformers, under ``"gap_triton"``.
        processor: Its processor, which has an image token, and pads on the left from now on.
        box_format: How it is asked for a box.
        embedded: Its architecture, where it is one of the embedded models.
        max_new_tokens: Length of an answer at most.

    Raises:
        ValueError: Boxes are pixels of the resized image, and the processor does not tell its size.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        box_format: BoxFormat,
        *,
        embedded: Architecture | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        self.generator: Any = model
        self.model, self.processor, self.format = model, processor, box_format
        self.embedded, self.max_new_tokens = embedded, max_new_tokens
        image_processor = getattr(processor, "image_processor", None)
        self._background = background_of(image_processor)
        self._patch_size = getattr(image_processor, "patch_size", None)
        if box_format.frame == "resized" and self._patch_size is None:
            raise ValueError(
                f"format {box_format.name!r} writes pixels of the resized image, and {type(processor).__name__} tells no "
                "patch size, by which to find its size: expected the processor of a Qwen-VL"
            )
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"

    def text(self, question: Question) -> str:
        """Return what is asked, in the words that the model was trained on."""
        return (PROMPT if question.box is None else self.format.question).replace("{}", question.text)

    def prompt(self, question: Question) -> str:
        """Return the text for the processor: one image, then what is asked."""
        text = self.text(question)
        if self.embedded is not None:
            return self.embedded.prompt(text)
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return f"{self.processor.image_token}{text}"

    def prepare(self, questions: Sequence[Question]) -> Batch:
        """Read the images of questions and make inputs of them, padded to one length, on the device of the model."""
        images = [question.load() for question in questions]
        inputs = self.processor(
            images=[self._as_seen(image) for image in images],
            text=[self.prompt(question) for question in questions],
            padding=True,
            return_tensors="pt",
        )
        views = []
        for sample, image in enumerate(images):
            resized = None if self._patch_size is None else resized_by(inputs, self._patch_size, sample)
            views.append(View(image.width, image.height, resized))
        return Batch(inputs.to(self.model.device, self.model.dtype), views)

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int | None = None) -> Any:
        """Run ``generate`` greedily; returns its output as a dictionary, with the cache."""
        return self.generator.generate(
            **batch.inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            return_dict_in_generate=True,
        )

    def new_tokens(self, batch: Batch, output: Any) -> torch.Tensor:
        """Return what was generated, [B, L] int64, without the prompts."""
        return output.sequences[:, batch.inputs["input_ids"].shape[1] :]

    def visual_tokens(self, batch: Batch) -> list[int]:
        """Return how many visual tokens each prompt has."""
        ids = batch.inputs["input_ids"]
        return (
            torch.isin(ids, torch.tensor(visual_token_ids(self.model.config), device=ids.device))
            .sum(1)
            .tolist()
        )

    def ask(self, questions: Sequence[Question], config: GapConfig) -> list[Answer]:
        """Return the answers to questions in one batch, pruned as ``config``, for which the model was configured, says."""
        batch = self.prepare(questions)
        before = gap_triton.last_selection(self.model)
        tokens = self.new_tokens(batch, self.generate(batch))
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        visual = self.visual_tokens(batch)
        after = gap_triton.last_selection(self.model)
        # The selection of another batch is still there where nothing was dropped from this one.
        kept = [float(count) for count in visual] if after is before else self._kept(after, config, visual)
        return [
            Answer(text.strip(), view, count, of_layers)
            for text, view, count, of_layers in zip(texts, batch.views, visual, kept, strict=True)
        ]

    def _as_seen(self, image: Image.Image) -> Image.Image:
        if self.embedded is not None:
            return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        return self.format.prepare(image, self._background)

    def _kept(self, selection: Any, config: GapConfig, visual: Sequence[int]) -> list[float]:
        """Visual tokens of each sample, mean over decoder layers."""
        counts = []  # of the stages, the last first
        while selection is not None:
            counts.append((selection.visual_index >= 0).sum(1).tolist())
            selection = selection.before
        layers = self.model.config.get_text_config().num_hidden_layers
        # A stage at layer k leaves its tokens to the layers from k + 1 on.
        firsts = [0, *(stage.layer + 1 for stage in config.stages), layers]
        sums = [
            sum(
                count * (end - start) for count, (start, end) in zip(of_sample, pairwise(firsts), strict=True)
            )
            for of_sample in zip(visual, *reversed(counts), strict=True)
        ]
        return [total / layers for total in sums]
