"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of many sizes in one sequence, a decoder with three axes of ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..vision_tower.finding import earlier_layers, layers_without_windows
from .layouts import PackedFamily
from .model import GapModel
from .processor import GapProcessor, ImagesAlone


class GapQwenProcessor(GapProcessor):
    """What the processors share."""

    def image_tokens(self, processed: Mapping[str, Any]) -> list[int]:
        """Return one token for each square of patches."""
        sizes = processed.get("image_grid_thw")
        if sizes is None:
            return []
        merge = self.info.get_hf_config().vision_config.spatial_merge_size  # type: ignore[attr-defined]
        return (sizes.prod(-1) // merge**2).tolist()


class GapQwenModel(GapModel):
    """What the models share."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        vision = config.vision_config
        full = getattr(vision, "fullatt_block_indexes", None)
        window = None
        if full is not None:
            window = vision.window_size // vision.spatial_merge_size // vision.patch_size
        family = PackedFamily(
            placeholders=(config.image_token_id,),
            leading=0,
            axes=3,
            merge=vision.spatial_merge_size,
            window=window,
        )
        blocks = getattr(self.visual, "blocks", ())  # type: ignore[attr-defined]
        layers = {}
        if blocks:
            seeing = layers_without_windows(vision, len(blocks))
            places = {"": -1 if full is None else max(full)}
            places |= {f"{name}_": index for name, index in earlier_layers(seeing, len(blocks)).items()}
            layers = {prefix: blocks[index].attn.attn for prefix, index in places.items()}
        self.start_pruning(vllm_config, family, layers)


class GapQwen2VLProcessingInfo(ImagesAlone, Qwen2VLProcessingInfo):
    """What vLLM knows of Qwen2-VL."""


class GapQwen2VLProcessor(GapQwenProcessor, Qwen2VLMultiModalProcessor):
    """The processor of Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    GapQwen2VLProcessor, info=GapQwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class GapQwen2VLForConditionalGeneration(GapQwenModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class GapQwen2_5_VLProcessingInfo(ImagesAlone, Qwen2_5_VLProcessingInfo):
    """What vLLM knows of Qwen2.5-VL."""


class GapQwen2_5_VLProcessor(GapQwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """The processor of Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    GapQwen2_5_VLProcessor, info=GapQwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class GapQwen2_5_VLForConditionalGeneration(GapQwenModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class GapQwen3VLProcessingInfo(ImagesAlone, Qwen3VLProcessingInfo):
    """What vLLM knows of Qwen3-VL."""


class GapQwen3VLProcessor(GapQwenProcessor, Qwen3VLMultiModalProcessor):
    """The processor of Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    GapQwen3VLProcessor, info=GapQwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class GapQwen3VLForConditionalGeneration(GapQwenModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, whose features for the first decoder layers (deepstack) lie beside those of the input and stay with them."""
