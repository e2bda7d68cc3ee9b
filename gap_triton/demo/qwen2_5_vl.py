"""The Qwen2.5-VL: a vision tower with rotary positions only, and a decoder with 3-D position ids (M-RoPE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .architecture import DECODER, Architecture
from .native import NativeProcessor
from .scenes import GRID, IMAGE_SIZE, PATCH
from .vocabulary import (
    BOS,
    IMAGE_PAD,
    MORE_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    token_id,
)

MERGE = 2  # patches along each side of a visual token
FINE = PATCH // MERGE  # pixels along each side of a patch of the tower
FRAMES = 2  # an image is a clip of two equal frames

# The rotary dimensions go to time, height and width in this order, from fast to slow. Width turns by 0.31 to 0.14 rad
# from one visual token to the next, so by 2.2 to 1.0 rad across the image. With the usual theta, made for long
# sequences, it would hardly turn at all.
SECTIONS = (2, 7, 7)
THETA = 8.0


class Qwen25VL(Architecture):
    """An ordinary Qwen2.5-VL.

    Its tower has no absolute positions, so where a visual token is reaches the decoder mostly through its 3-D id.
    """

    name = "qwen2_5_vl"
    folder = Path(__file__).parent / "model_mrope"
    tokens = MORE_TOKENS
    image_token = IMAGE_PAD
    before = (BOS, VISION_START)
    after = (VISION_END,)

    def load_processor(self, folder: Path) -> NativeProcessor:
        """Load a stand-in for the processor: transformers wants torchvision for the video half of the real one."""
        return NativeProcessor(AutoTokenizer.from_pretrained(folder), self)

    def build(self, special: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
        """Build it: a tower with windows in its first block and full attention in the others."""
        vision = {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 2,
            "patch_size": FINE,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "window_size": IMAGE_SIZE // 2,
            "fullatt_block_indexes": [1, 2],
            "out_hidden_size": DECODER["hidden_size"],
        }
        text = {
            "vocab_size": len(self.tokens),
            "rope_theta": THETA,
            "rope_scaling": {"type": "mrope", "mrope_section": list(SECTIONS)},
            "rms_norm_eps": 1e-6,
            **DECODER,
            **special,
        }
        config = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=token_id(IMAGE_PAD),
            video_token_id=token_id(VIDEO_PAD),
            vision_start_token_id=token_id(VISION_START),
            vision_end_token_id=token_id(VISION_END),
            architectures=["Qwen2_5_VLForConditionalGeneration"],
        )
        return Qwen2_5_VLForConditionalGeneration(config)

    def pixel_values(self, images: Tensor) -> Tensor:
        """Cut images into patches, those of one visual token in a row: [N * 4 * VISUAL, 3 * FRAMES * FINE * FINE]."""
        pixels = images.float() / 127.5 - 1
        pixels = pixels.reshape(-1, 3, GRID, MERGE, FINE, GRID, MERGE, FINE).permute(0, 2, 5, 3, 6, 1, 4, 7)
        pixels = pixels.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, FRAMES, -1, -1)
        return pixels.reshape(-1, 3 * FRAMES * FINE * FINE)

    def image_grid(self, count: int) -> Tensor:
        """Return the frames, rows and columns of patches of ``count`` images: [count, 3] int64."""
        return torch.tensor([[1, GRID * MERGE, GRID * MERGE]] * count)

    def visual_features(self, model: Any, pixel_values: Tensor) -> Tensor:
        """Run the tower with its merger."""
        count = len(pixel_values) // (GRID * MERGE) ** 2
        features = model.model.get_image_features(pixel_values, self.image_grid(count))
        # One tensor an image: in version 4 of transformers the result itself, later within it.
        return torch.stack(list(features if isinstance(features, tuple) else features.pooler_output))

    def position_ids(self, within: Tensor) -> Tensor:
        """Number frames, rows and columns as ``get_rope_index`` does: [3, 1, L] int64."""
        start = len(self.before)
        row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        visual = start + torch.stack([torch.zeros_like(row), row, column]).flatten(1)
        # Text goes on behind the largest id of the image, the same along all three axes.
        text = start + GRID + torch.cat([torch.arange(len(self.after)), len(self.after) + within])
        return torch.cat([torch.arange(start).expand(3, -1), visual, text.expand(3, -1)], 1)[:, None]

    def image_processor_file(self) -> dict[str, Any]:
        """Scale a square image of any size to the native one; another keeps its shape and gets another grid."""
        pixels = IMAGE_SIZE**2
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "min_pixels": pixels,
            "max_pixels": pixels,
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "patch_size": FINE,
            "temporal_patch_size": FRAMES,
            "merge_size": MERGE,
        }

    def processor_file(self) -> dict[str, Any]:
        """Return the class: it finds out the rest."""
        return {"processor_class": "Qwen2_5_VLProcessor"}

    def config_file(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Write M-RoPE down as transformers 4 does, which later versions still read."""
        text = {name: value for name, value in saved["text_config"].items() if name != "rope_parameters"}
        text |= {"rope_theta": THETA, "rope_scaling": {"type": "mrope", "mrope_section": list(SECTIONS)}}
        return saved | {"text_config": text}
