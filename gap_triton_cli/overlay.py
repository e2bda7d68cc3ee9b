"""The picture of ``gap-triton run --overlay``: which visual tokens were kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

import gap_triton

OVERLAY_TYPES = ("llava", "llava_next", "llava_onevision")


def check_overlay(config: Any) -> None:
    """Raise ValueError unless the visual tokens of such a model begin with one square grid over the whole image."""
    if config.model_type not in OVERLAY_TYPES:
        raise ValueError(
            f"overlay: kept tokens can be drawn for {', '.join(OVERLAY_TYPES)}, whose visual tokens begin with a square "
            f"grid over the whole image, and this is a model_type={config.model_type!r}; leave the overlay out"
        )


def save_kept_tokens(
    model: Any, processor: Any, inputs: Any, selection: gap_triton.Selection, answer: str, path: Path
) -> None:
    """Write the image as the model sees it, patches of dropped tokens dimmed.

    A model that cuts the image into tiles puts an overview of the whole image first; that overview is what is drawn.
    """
    from gap_triton.demo.grounding import boxes_from_tokens
    from gap_triton.demo.pictures import Example, kept_grid, save_overlay

    vision = model.config.vision_config
    clip_row = int(
        model.config.vision_feature_select_strategy == "full" and vision.model_type.startswith("clip")
    )
    side = vision.image_size // vision.patch_size
    pixels = inputs["pixel_values"][0].float().cpu()
    while pixels.dim() > 3:  # [tiles, 3, H, W]: the overview comes first
        pixels = pixels[0]
    scaling = processor.image_processor
    mean, spread = (torch.tensor(x).view(3, 1, 1) for x in (scaling.image_mean, scaling.image_std))
    image = ((pixels * spread + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    box = boxes_from_tokens([answer])[0]
    boxes = {} if math.isnan(float(box[0])) else {"kept": box}
    shown = answer if len(answer) <= 60 else answer[:57] + "..."
    save_overlay(
        [Example(image, shown, kept_grid(selection, 0, side, clip_row), boxes)], "kept visual tokens", path
    )
