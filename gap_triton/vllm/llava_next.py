"""LLaVA-NeXT and LLaVA-OneVision: an overview and tiles of an image, with a newline token after each row of the tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..config import needs_grid
from ..vision.layout import Layout
from ..vision.pictures import INTERPOLATED, numbered_newline
from .layouts import TiledFamily
from .llava import leading_rows, scoring_layers
from .model import GapModel
from .options import PREFIX, Options
from .processor import GapProcessor, ImagesAlone

NEXT = LlavaNextForConditionalGeneration._merge_image_patch_embeddings
ONEVISION = partial(
    LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings, image_newline=numbered_newline()
)


def tiled_family(config: Any, pack: Callable[..., Tensor]) -> TiledFamily:
    """Return how images of a checkpoint with ``config`` are laid out.

    Args:
        config: The outer configuration.
        pack: The method of vLLM's model that packs the tiles of an image. It gets numbers in the place of features.
    """
    vision = config.vision_config
    instance = SimpleNamespace(config=config, image_newline=numbered_newline())
    return TiledFamily(
        placeholders=(config.image_token_index,),
        leading=leading_rows(config),
        axes=1,
        side=vision.image_size // vision.patch_size,
        pixels=vision.image_size,
        pinpoints=tuple(map(tuple, config.image_grid_pinpoints)),
        pack=partial(pack, instance, strategy="spatial_unpad"),
    )


class GapTilesProcessor(GapProcessor):
    """What the processors share.

    Attributes:
        gap_pack: The method of vLLM's model that packs the tiles of an image.
    """

    gap_pack: ClassVar[Callable[..., Tensor]]

    @cached_property
    def gap_family(self) -> TiledFamily:
        """How the model lays out its images."""
        return tiled_family(self.info.get_hf_config(), type(self).gap_pack)  # type: ignore[attr-defined]

    def image_tokens(self, processed: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return the numbers of their tokens, newlines among them."""
        return {"image": [layout.counts[0] for layout in self._layouts(processed)]}

    def check_images(self, processed: Mapping[str, Any], options: Options) -> None:
        """Refuse images that are too large for the model, where it matters where their tokens stand."""
        if not needs_grid(options.config):
            return
        for layout in self._layouts(processed):
            (tokens,) = layout.counts
            if not layout.views and options.kept(tokens) < tokens:
                raise ValueError(
                    f"{INTERPOLATED}: send a smaller image, or mm_processor_kwargs={{'{PREFIX}keep': 1.0}}"
                )

    def _layouts(self, processed: Mapping[str, Any]) -> list[Layout]:
        sizes = processed.get("image_sizes", ())
        return self.gap_family.layouts({"image_sizes": torch.as_tensor(sizes)}, len(sizes))


class GapTilesModel(GapModel):
    """What the models share.

    Attributes:
        gap_pack: The method of vLLM's model that packs the tiles of an image.
    """

    gap_pack: ClassVar[Callable[..., Tensor]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        family = tiled_family(config, type(self).gap_pack)
        self.start_pruning(vllm_config, family, scoring_layers(self.vision_tower, config))  # type: ignore[attr-defined]


class GapLlavaNextProcessingInfo(ImagesAlone, LlavaNextProcessingInfo):
    """What vLLM knows of LLaVA-NeXT."""


class GapLlavaNextProcessor(GapTilesProcessor, LlavaNextMultiModalProcessor):
    """The processor of LLaVA-NeXT."""

    has_cls = True
    gap_pack = NEXT


@MULTIMODAL_REGISTRY.register_processor(
    GapLlavaNextProcessor, info=GapLlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class GapLlavaNextForConditionalGeneration(GapTilesModel, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    gap_pack = NEXT


class GapLlavaOnevisionProcessingInfo(ImagesAlone, LlavaOnevisionProcessingInfo):
    """What vLLM knows of LLaVA-OneVision."""

    why = "because LLaVA-OneVision makes one token of several that the tower scores, by interpolation"


class GapLlavaOnevisionProcessor(GapTilesProcessor, LlavaOnevisionMultiModalProcessor):
    """The processor of LLaVA-OneVision, whose tower has no CLS token."""

    gap_pack = ONEVISION


@MULTIMODAL_REGISTRY.register_processor(
    GapLlavaOnevisionProcessor,
    info=GapLlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class GapLlavaOnevisionForConditionalGeneration(GapTilesModel, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    gap_pack = ONEVISION
