"""LLaVA-1.5: images of one size, a tower with a CLS token, a decoder with one axis of ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .layouts import SquareFamily
from .model import GapModel
from .processor import GapProcessor, ImagesAlone


def leading_rows(config: Any) -> int:
    """Return how many rows of the tower don't become tokens: the CLS token, where features are chosen without it."""
    return int(config.vision_feature_select_strategy == "default")


def scoring_layer(tower: nn.Module) -> nn.Module | None:
    """Return the attention of the last layer, None in a later rank of a pipeline.

    vLLM builds a tower up to the layer whose output becomes the features, and no further.
    """
    encoder: Any = getattr(getattr(tower, "vision_model", None), "encoder", None)
    return None if encoder is None else encoder.layers[-1].self_attn.attn


class GapLlavaProcessingInfo(ImagesAlone, LlavaProcessingInfo):
    """What vLLM knows of LLaVA-1.5."""


class GapLlavaProcessor(GapProcessor, LlavaMultiModalProcessor):
    """Its processor."""

    has_cls = True

    def image_tokens(self, processed: Mapping[str, Any]) -> list[int]:
        """Return the same number for each image."""
        return [self.info.get_max_image_tokens()] * len(processed.get("pixel_values", ()))


@MULTIMODAL_REGISTRY.register_processor(
    GapLlavaProcessor, info=GapLlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class GapLlavaForConditionalGeneration(GapModel, LlavaForConditionalGeneration):
    """The model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        vision = config.vision_config
        family = SquareFamily(
            placeholders=(config.image_token_index,),
            leading=leading_rows(config),
            axes=1,
            side=vision.image_size // vision.patch_size,
        )
        self.start_pruning(vllm_config, family, scoring_layer(self.vision_tower))
