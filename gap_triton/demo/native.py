"""The processor of the Qwen2.5-VL, for images of the model's own size."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, Qwen2_5_VLModel

from .scenes import IMAGE_SIZE


class ImageLayout(Protocol):
    """How a model takes its images: what the processor needs of an architecture."""

    image_token: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """All tokens ahead of the question."""

    def pixel_values(self, images: Tensor) -> Tensor:
        """Return the patches of uint8 images [N, 3, IMAGE_SIZE, IMAGE_SIZE]."""

    def image_grid(self, images: int) -> Tensor:
        """Return the frames, rows and columns of patches of so many images: [N, 3]."""


class NativeProcessor:
    """Makes of prompts and images what ``AutoProcessor`` makes of them, without torchvision.

    Transformers loads the real processor together with its video half, and that needs torchvision, which nothing else
    here does.

    Args:
        tokenizer: What ``AutoTokenizer`` loads.
        architecture: Whose placeholder and pixel layout to use.
    """

    def __init__(self, tokenizer: Any, architecture: ImageLayout) -> None:
        self.tokenizer = tokenizer
        self.image_token = architecture.image_token
        self.batch_decode = tokenizer.batch_decode
        self.decode = tokenizer.decode
        self._architecture = architecture

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        text: str | Sequence[str],
        padding: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Make model inputs of prompts with one image each.

        Args:
            images: RGB images of IMAGE_SIZE x IMAGE_SIZE pixels, one a prompt.
            text: Prompts with one image token each.
            padding: Whether to pad the prompts, on the left, to one length.
            return_tensors: ``"pt"``.

        Returns:
            ``input_ids`` and ``attention_mask`` [N, L], ``pixel_values`` [patches, values] and ``image_grid_thw``
            [N, 3]; with transformers 5 also ``mm_token_type_ids`` [N, L], 1 for a visual token.

        Raises:
            ValueError: An image has another size, or a prompt not one image token.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        text = [text] if isinstance(text, str) else list(text)
        for image in images:
            if image.size != (IMAGE_SIZE, IMAGE_SIZE) or image.mode != "RGB":
                raise ValueError(
                    f"images holds a {image.mode} image of {image.size[0]} x {image.size[1]} pixels; expected RGB, "
                    f"{IMAGE_SIZE} x {IMAGE_SIZE}: convert and resize it first, or use AutoProcessor with torchvision"
                )
        counts = [prompt.count(self.image_token) for prompt in text]
        if counts != [1] * len(images):
            raise ValueError(
                f"text has {counts} times {self.image_token} in its {len(counts)} prompts, for {len(images)} images; "
                "expected one in each prompt, and one image for each"
            )
        one = self.image_token
        visual = one * self._architecture.prefix.count(one)
        inputs = self.tokenizer(
            [prompt.replace(one, visual) for prompt in text], padding=padding, return_tensors=return_tensors
        )
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        inputs["pixel_values"] = self._architecture.pixel_values(pixels)
        inputs["image_grid_thw"] = self._architecture.image_grid(len(images))
        # Version 4 of transformers finds the visual tokens itself, and refuses the argument.
        if "mm_token_type_ids" in inspect.signature(Qwen2_5_VLModel.forward).parameters:
            placeholder = self.tokenizer.convert_tokens_to_ids(self.image_token)
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == placeholder).long()
        return BatchFeature(dict(inputs))
