"""Asking Shikra and MiniGPT-v2, models of the GAP paper that transformers does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models import minigpt_v2, shikra
from ..models.visual_decoder import IMAGE_TOKEN, VisualDecoder
from .asking import Asker, Batch, background_of
from .boxes import FORMATS, BoxFormat, View
from .question import Question

# What goes around a question; the image's token stands in the question where there is one, else in front of it.
SHIKRA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: {} ASSISTANT:"
)
MINIGPT_V2 = "<s>[INST] <Img><ImageHere></Img> {} [/INST]"


class DecoderAsker(Asker):
    """Puts questions to a vision tower and a decoder.

    Args:
        whole: The model; its decoder is what is pruned.
        tokenizer: Its tokenizer.
        image_processor: Makes pixel values of images, each of the same size.
        box_format: How it is asked for a box.
        template: What goes around a question.
        prompt_ids: Makes token ids of a prompt.
        visual_tokens: Of an image.
        max_new_tokens: Length of an answer at most.
    """

    def __init__(
        self,
        whole: VisualDecoder,
        tokenizer: Any,
        image_processor: Any,
        box_format: BoxFormat,
        template: str,
        prompt_ids: Callable[[Any, str, int], torch.Tensor],
        visual_tokens: int,
        *,
        max_new_tokens: int = 64,
    ) -> None:
        self.generator, self.model, self.processor = whole, whole.decoder, tokenizer
        self.format, self.max_new_tokens = box_format, max_new_tokens
        self._image_processor, self._background = image_processor, background_of(image_processor)
        self._template, self._prompt_ids, self._visual_tokens = template, prompt_ids, visual_tokens

    def prompt(self, question: Question) -> str:
        """Return the whole prompt, with a token for the image."""
        text = self.text(question)
        if (
            shikra.IMAGE not in text
            and shikra.IMAGE not in self._template
            and minigpt_v2.IMAGE not in self._template
        ):
            text = f"{shikra.IMAGE} {text}"
        return self._template.replace("{}", text)

    def prepare(self, questions: Sequence[Question]) -> Batch:
        """Read the images of questions and make inputs of them, padded on the left to one length."""
        images = [question.load() for question in questions]
        pixels = self._image_processor(
            images=[self.format.prepare(image, self._background) for image in images], return_tensors="pt"
        )["pixel_values"]
        prompts = [
            self._prompt_ids(self.processor, self.prompt(question), self._visual_tokens)[0]
            for question in questions
        ]
        length = max(map(len, prompts))
        ids = torch.stack([torch.nn.functional.pad(each, (length - len(each), 0)) for each in prompts])
        mask = torch.stack([(torch.arange(length) >= length - len(each)).long() for each in prompts])
        device = self.model.device
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(self.model.dtype)}
        return Batch(
            {name: value.to(device) for name, value in inputs.items()},
            [View(image.width, image.height) for image in images],
        )

    def visual_tokens(self, batch: Batch) -> list[int]:
        """Return how many visual tokens each prompt has."""
        return (batch.inputs["input_ids"] == IMAGE_TOKEN).sum(1).tolist()

    def new_tokens(self, batch: Batch, output: Any) -> torch.Tensor:
        """Return what was generated: all of it, as always from ``inputs_embeds``."""
        return output.sequences


def shikra_asker(whole: VisualDecoder, tokenizer: Any, image_processor: Any, **options: Any) -> DecoderAsker:
    """Return what asks a Shikra from `gap_triton.models.shikra.load`; ``options``: of `DecoderAsker`."""
    visual = options.pop("visual_tokens", shikra.VISUAL_TOKENS)
    return DecoderAsker(
        whole, tokenizer, image_processor, FORMATS["shikra"], SHIKRA, shikra.prompt_ids, visual, **options
    )


def minigpt_v2_asker(
    whole: VisualDecoder, tokenizer: Any, image_processor: Any, **options: Any
) -> DecoderAsker:
    """Return what asks a MiniGPT-v2 from `gap_triton.models.minigpt_v2.load`; ``options``: of `DecoderAsker`."""
    visual = options.pop("visual_tokens", minigpt_v2.VISUAL_TOKENS)
    return DecoderAsker(
        whole,
        tokenizer,
        image_processor,
        FORMATS["minigpt-v2"],
        MINIGPT_V2,
        minigpt_v2.prompt_ids,
        visual,
        **options,
    )
