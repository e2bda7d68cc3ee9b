"""The LLaVA: CLIP vision tower, two-layer projector, Llama decoder with 1-D RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .architecture import DECODER, VISUAL, Architecture
from .scenes import IMAGE_SIZE, PATCH
from .vocabulary import BOS, IMAGE, TOKENS, token_id


class Llava(Architecture):
    """An ordinary LLaVA; its tower has the learned absolute positions of any CLIP."""

    name = "llava"
    folder = Path(__file__).parent / "model"
    tokens = TOKENS
    image_token = IMAGE
    before = (BOS,)
    after = ()

    def build(self, special: dict[str, int]) -> LlavaForConditionalGeneration:
        """Build it: two tower layers, because that is cheap."""
        vision = CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=96,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(vocab_size=len(self.tokens), **DECODER, **special),
            image_token_index=token_id(self.image_token),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",  # the CLS row never reaches the decoder
            image_seq_length=VISUAL,
            architectures=["LlavaForConditionalGeneration"],
        )
        return LlavaForConditionalGeneration(config)

    def pixel_values(self, images: Tensor) -> Tensor:
        """Turn pixels into the model's -1..1 range, [N, 3, IMAGE_SIZE, IMAGE_SIZE]."""
        return images.float() / 127.5 - 1

    def visual_features(self, model: Any, pixel_values: Tensor) -> Tensor:
        """Take the output of the tower's last layer for the patches, without CLS, through the projector."""
        hidden = model.model.vision_tower(pixel_values).last_hidden_state
        return model.model.multi_modal_projector(hidden[:, 1:])

    def position_ids(self, within: Tensor) -> Tensor:
        """Count on from the image: [1, L] int64."""
        prefix = len(self.prefix)
        return torch.cat([torch.arange(prefix), prefix + within])[None]

    def image_processor_file(self) -> dict[str, Any]:
        """Stretch any image file to the native size."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "resample": 3,  # bicubic
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }

    def processor_file(self) -> dict[str, Any]:
        """Return one placeholder for each patch; CLS is counted and taken off again."""
        return {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": PATCH,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        }

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name the tower's weights as LLaVA checkpoints always have.

        Transformers 5 dropped one level of their names and still reads the old ones; version 4 reads no others.
        """
        long, short = "model.vision_tower.vision_model.", "model.vision_tower."
        return {
            name if name.startswith(long) else name.replace(short, long): weight
            for name, weight in state.items()
        }
