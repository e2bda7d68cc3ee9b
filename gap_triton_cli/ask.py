"""One question about one image, for ``gap-triton run``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import gap_triton
from gap_triton import GapConfig
from gap_triton.demo.architecture import Architecture
from gap_triton.demo.architectures import LLAVA, QWEN2_5_VL
from gap_triton.demo.scenes import IMAGE_SIZE
from gap_triton.environment import default_device

EMBEDDED: dict[str, Architecture] = {"embedded": LLAVA, "embedded-mrope": QWEN2_5_VL}
OVERLAY_TYPES = ("llava", "llava_next", "llava_onevision")


def ask(
    model_path: str,
    images: Sequence[Image.Image],
    prompt: str,
    config_for: Callable[[Any], GapConfig],
    max_new_tokens: int,
    overlay: Path | None,
    console: Console,
) -> str:
    """Load a model by path or hub id, answer one prompt about images with pruning, and print what was kept.

    Args:
        model_path: Folder or hub id of a supported model, or one of `EMBEDDED`.
        images: RGB images, in the order of their tokens in the prompt.
        prompt: The question; the processor's image tokens are put in front where they are missing, through the chat
            template where the processor has one.
        config_for: What to prune in a model that has been loaded.
        max_new_tokens: Length of the answer at most.
        overlay: Where to write a picture of the kept tokens, None = nowhere.
        console: Where to print.

    Returns:
        The answer.

    Raises:
        ValueError: There is no such model, it can't be loaded or pruned, the prompt has image tokens for another number of
            images, or ``overlay`` is given and its tokens can't be drawn.
        ImportError: Its processor needs a package that is not installed.
    """
    embedded = EMBEDDED.get(model_path)
    path = model_path if embedded is None else str(embedded.folder)
    # Weights are loaded last: they take longest.
    with naming_the_model(model_path):
        loaded_config = AutoConfig.from_pretrained(path)
        processor = (
            AutoProcessor.from_pretrained(path) if embedded is None else embedded.load_processor(Path(path))
        )
    if overlay is not None:
        check_overlay(loaded_config)
    if embedded is not None:
        images = [image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for image in images]
    image_text = None if embedded is None else embedded.image_text
    text = with_images(processor, prompt, len(images), image_text)
    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with naming_the_model(model_path):
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="gap_triton"
        ).to(device)
    config = config_for(model)
    gap_triton.configure(model, config)
    inputs = processor(images=list(images), text=text, return_tensors="pt").to(device, dtype)
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
    stage: gap_triton.Selection | None = selection
    while stage is not None:
        stages.insert(0, stage)
        stage = stage.before
    locations = [
        "before the decoder" if stage.layer < 0 else f"after layer {stage.layer}" for stage in config.stages
    ]
    counts = [str(each.visual_index.shape[1]) for each in stages]
    counts[0] += f" of {int(selection.visual.sum())} visual tokens"
    kept = ", ".join(f"{count} {location}" for count, location in zip(counts, locations, strict=True))
    console.print(f"kept {kept}, ids {config.ids}", style="dim")
    if overlay is not None:
        save_kept_tokens(model, processor, inputs, selection, answer, overlay)
        console.print(f"wrote {overlay}", highlight=False, soft_wrap=True)
    return answer


@contextmanager
def naming_the_model(model_path: str) -> Iterator[None]:
    """Make any error inside a ValueError that names the model; that a package is missing stays what it is.

    A model's files are others', and so is the code that reads them: there is no saying what it raises.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"model {model_path!r} can't be loaded: {kind}{error}") from error


def check_overlay(config: Any) -> None:
    """Raise ValueError unless the visual tokens of such a model begin with one square grid over the whole image."""
    if config.model_type not in OVERLAY_TYPES:
        raise ValueError(
            f"overlay: kept tokens can be drawn for {', '.join(OVERLAY_TYPES)}, whose visual tokens begin with a square "
            f"grid over the whole image, and this is a model_type={config.model_type!r}; leave the overlay out"
        )


def with_images(processor: Any, prompt: str, images: int, image_text: str | None = None) -> str:
    """Put ``images`` images in front of ``prompt``, unless it has their tokens.

    Each is what the chat template makes of it; where the processor has none, ``image_text``, or its image token alone.

    Raises:
        ValueError: It has them for another number of images, or ``processor`` has no such token.
    """
    token = getattr(processor, "image_token", None)
    if token is None:
        raise ValueError(
            f"{type(processor).__name__} of this model has no image token, so it can't take an image"
        )
    count = prompt.count(token)
    if count not in (0, images):
        raise ValueError(
            f"prompt has {token} {count} times, and {images} images are given: "
            "have one for each, or leave them out to have them put in front"
        )
    if count:
        return prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    return f"{(image_text or token) * images} {prompt}"


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
