"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos of many sizes in one sequence, a decoder with three axes of ids."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import nn
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
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration, Qwen3_5ProcessingInfo
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..vision.layout import Layout
from ..vision_tower.finding import earlier_layers, last_third, layers_without_windows
from .choose import survivors_by_view
from .layouts import PackedFamily
from .model import GapModel
from .options import Options
from .plan import FIELDS, Plan, plans_of, rows_of
from .processor import GapProcessor


def packed_family(config: Any, frame_start: int | None = None) -> PackedFamily:
    """Return how images and videos of a checkpoint with ``config`` are laid out.

    Args:
        config: The outer configuration.
        frame_start: As in `Family`.
    """
    vision = config.vision_config
    window = None
    if getattr(vision, "fullatt_block_indexes", None) is not None:
        window = vision.window_size // vision.spatial_merge_size // vision.patch_size
    return PackedFamily(
        placeholders=(config.image_token_id, config.video_token_id),
        leading=0,
        axes=3,
        merge=vision.spatial_merge_size,
        window=window,
        per_second=getattr(vision, "tokens_per_second", 1.0),
        frame_start=frame_start,
    )


class GapQwenProcessor(GapProcessor):
    """What the processors share."""

    whole_tower = True

    @cached_property
    def gap_family(self) -> PackedFamily:
        """How the model lays out its images and videos."""
        return packed_family(self.info.get_hf_config())  # type: ignore[attr-defined]

    def image_tokens(self, processed: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return one token for each square of patches."""
        return {
            modality: [layout.counts[0] for layout in self._layouts(processed, modality)]
            for modality in FIELDS
        }

    def _layouts(self, processed: Mapping[str, Any], modality: str) -> list[Layout]:
        name = f"{modality}_grid_thw"
        sizes = processed.get(name)
        return [] if sizes is None else self.gap_family.layouts({name: sizes}, len(sizes))


class GapFramesProcessor(GapQwenProcessor):
    """What processors share that put the time of each frame of a video before it."""

    @cached_property
    def gap_family(self) -> PackedFamily:
        """How the model lays out its images and videos."""
        config = self.info.get_hf_config()  # type: ignore[attr-defined]
        return packed_family(config, config.vision_start_token_id)

    def check_images(self, processed: Mapping[str, Any], options: Options) -> None:
        """Refuse what says of a video alone how much of it stays, and not of its frames."""
        layouts = self._layouts(processed, "video")
        plans = plans_of(rows_of(options, [layout.counts[0] for layout in layouts]))
        for plan, layout in zip(plans, layouts, strict=True):
            if survivors_by_view(plan, layout) is None:
                raise ValueError(
                    f"score={plan.score!r} with coverage={plan.coverage!r} and merge={plan.merge!r}: how many tokens stay "
                    "of each frame of a video is then not known before it is encoded, and the prompt has the time of each "
                    "frame before it: use a score of the vision tower, such as 'received', or 'spatial'"
                )

    def rows_of_image(self, modality: str, fields: Mapping[str, Any], plan: Plan) -> list[int]:
        """Return how many tokens survive of each frame of a video."""
        if modality != "video":
            return super().rows_of_image(modality, fields, plan)
        (layout,) = self.gap_family.layouts({"video_grid_thw": fields["video_grid_thw"]}, 1)
        rows = survivors_by_view(plan, layout)
        assert rows is not None  # or it was refused
        return rows


class GapQwenModel(GapModel):
    """What the models share.

    Attributes:
        frames_apart: The time of each frame of a video stands before it.
    """

    frames_apart = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        vision = config.vision_config
        full = getattr(vision, "fullatt_block_indexes", None)
        family = packed_family(config, config.vision_start_token_id if self.frames_apart else None)
        blocks: Any = getattr(self.visual, "blocks", ())  # type: ignore[attr-defined]
        layers: dict[str, nn.Module] = {}
        norms: list[nn.Module] = []
        if blocks:
            seeing = layers_without_windows(vision, len(blocks))
            places = {"": -1 if full is None else max(full)}
            places |= {f"{name}_": index for name, index in earlier_layers(seeing, len(blocks)).items()}
            layers = {prefix: blocks[index].attn.attn for prefix, index in places.items()}
            # What a layer puts out enters the next one, and in the end the module behind them.
            behind: Any = self.visual.merger  # type: ignore[attr-defined]
            following: Any = last_third(blocks)[1:]
            norms = [block.norm1 for block in following]
            norms.append(behind.ln_q if hasattr(behind, "ln_q") else behind.norm)
        self.start_pruning(vllm_config, family, layers, norms)


class GapQwen2VLProcessor(GapQwenProcessor, Qwen2VLMultiModalProcessor):
    """The processor of Qwen2-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    GapQwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class GapQwen2VLForConditionalGeneration(GapQwenModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class GapQwen2_5_VLProcessor(GapQwenProcessor, Qwen2_5_VLMultiModalProcessor):
    """The processor of Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    GapQwen2_5_VLProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class GapQwen2_5_VLForConditionalGeneration(GapQwenModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class GapQwen3VLProcessor(GapFramesProcessor, Qwen3VLMultiModalProcessor):
    """The processor of Qwen3-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    GapQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class GapQwen3VLForConditionalGeneration(GapQwenModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, whose features for the first decoder layers (deepstack) lie beside those of the input and stay with them."""

    frames_apart = True


class GapQwen3_5Processor(GapQwen3VLProcessor):
    """The processor of Qwen3.5."""

    recurrent = True


@MULTIMODAL_REGISTRY.register_processor(
    GapQwen3_5Processor, info=Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class GapQwen3_5ForConditionalGeneration(GapQwenModel, Qwen3_5ForConditionalGeneration):
    """Qwen3.5, some of whose decoder layers carry a state: what was dropped before the first layer never enters it."""

    frames_apart = True
