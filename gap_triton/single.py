"""One question about one image, for ``gap-triton run``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

import gap_triton
from gap_triton import GapConfig
from gap_triton.environment import default_device

OVERLAY_TYPES = ("llava", "llava_next", "llava_onevision")


def ask(
    model_path: str,
    image_path: Path,
    prompt: str,
    config_for: Callable[[Any], GapConfig],
    max_new_tokens: int,
    overlay: Path | None,
    console: Console,
) -> str:
    """Load a model by path or hub id, answer one prompt about one image with pruning, and print what was kept.

    Args:
        model_path: Folder or hub id of a supported model, or ``"embedded"``.
        image_path: Any image file that pillow reads.
        prompt: The question; the processor's image token is put in front where it is missing, through the chat template
            where the processor has one.
        config_for: What to prune in a model that has been loaded.
        max_new_tokens: Length of the answer at most.
        overlay: Where to write a picture of the kept tokens, None = nowhere.
        console: Where to print.

    Returns:
        The answer.

    Raises:
        ValueError: The model can't be pruned, or ``overlay`` is given and its tokens can't be drawn.
    """
    if model_path == "embedded":
        from gap_triton.demo.run import MODEL_PATH

        model_path = str(MODEL_PATH)
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(
        model_path, dtype=dtype, attn_implementation="gap_triton"
    )
    if overlay is not None:
        check_overlay(model)
    model = model.to(device)
    config = config_for(model)
    gap_triton.configure(model, config)
    processor = AutoProcessor.from_pretrained(model_path)
    inputs = processor(
        images=Image.open(image_path).convert("RGB"), text=_with_image(processor, prompt), return_tensors="pt"
    ).to(device, dtype)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
        0
    ].strip()
    console.print(answer, markup=False, highlight=False, soft_wrap=True)

    selection = gap_triton.last_selection(model)
    if selection is None:
        console.print("nothing dropped", style="dim")
        return answer
    stages: list[gap_triton.Selection] = []
    found: gap_triton.Selection | None = selection
    while found is not None:
        stages.insert(0, found)
        found = found.before
    places = [
        "before the decoder" if stage.layer < 0 else f"after layer {stage.layer}" for stage in config.stages
    ]
    counts = [str(each.visual_index.shape[1]) for each in stages]
    counts[0] += f" of {int(selection.visual.sum())} visual tokens"
    kept = ", ".join(f"{count} {place}" for count, place in zip(counts, places, strict=True))
    console.print(f"kept {kept}, ids {config.ids}", style="dim")
    if overlay is not None:
        save_kept_tokens(model, processor, inputs, selection, answer, overlay)
        console.print(f"wrote {overlay}", highlight=False, soft_wrap=True)
    return answer


def check_overlay(model: Any) -> None:
    """Raise ValueError unless the visual tokens of ``model`` begin with one square grid over the whole image."""
    if model.config.model_type not in OVERLAY_TYPES:
        raise ValueError(
            f"overlay: kept tokens can be drawn for {', '.join(OVERLAY_TYPES)}, whose visual tokens begin with a square "
            f"grid over the whole image, and this is a model_type={model.config.model_type!r}; leave the overlay out"
        )


def _with_image(processor: Any, prompt: str) -> str:
    token = getattr(processor, "image_token", None)
    if token is None:
        raise ValueError(
            f"{type(processor).__name__} of this model has no image token, so it can't take an image"
        )
    if token in prompt:
        return prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    return f"{token} {prompt}"


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
