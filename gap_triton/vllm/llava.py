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

from ..vision_tower.finding import earlier_layers
from .layouts import SquareFamily
from .model import GapModel
from .processor import GapProcessor, ImagesAlone


def leading_rows(config: Any) -> int:
    """Return how many rows of the tower don't become tokens: the CLS token, where features are chosen without it."""
    return int(config.vision_feature_select_strategy == "default")


def scoring_layers(tower: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Return what `TowerScores` watches, nothing in a later rank of a pipeline.

    vLLM builds a tower up to the layer whose output becomes the features, and no further.
    """
    encoder: Any = getattr(getattr(tower, "vision_model", None), "encoder", None)
    if encoder is None:
        return {}
    vision = config.vision_config
    places = {"": -1} | {
        f"{name}_": index
        for name, index in earlier_layers(range(vision.num_hidden_layers), vision.num_hidden_layers).items()
    }
    return {prefix: encoder.layers[index].self_attn.attn for prefix, index in places.items()}


class GapLlavaProcessingInfo(ImagesAlone, LlavaProcessingInfo):
    """What vLLM knows of LLaVA-1.5."""


class GapLlavaProcessor(GapProcessor, LlavaMultiModalProcessor):
    """Its processor."""

    has_cls = True

    def image_tokens(self, processed: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return the same number for each image."""
        return {"image": [self.info.get_max_image_tokens()] * len(processed.get("pixel_values", ()))}


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
        self.start_pruning(vllm_config, family, scoring_layers(self.vision_tower, config))
