"""Prompts as a model's processor takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from gap_triton.demo.architecture import Architecture
from gap_triton.demo.scenes import IMAGE_SIZE


def with_images(
    processor: Any, prompt: str, images: int, image_text: str | None = None, videos: int = 0
) -> str:
    """Put ``images`` images and ``videos`` videos in front of ``prompt``, unless it has their tokens.

    Each is what the chat template makes of it; where the processor has none, ``image_text``, or its token alone.

    Raises:
        ValueError: It has them for another number, or ``processor`` has no such token.
    """
    named = 0
    for kind, count in (("image", images), ("video", videos)):
        token = getattr(processor, f"{kind}_token", None)
        if token is None:
            if count:
                raise ValueError(
                    f"{type(processor).__name__} of this model has no {kind} token, so it can't take "
                    f"{'an image' if kind == 'image' else 'a video'}"
                )
            continue
        found = prompt.count(token)
        if found not in (0, count):
            raise ValueError(
                f"prompt has {token} {found} times, and {count} {kind}s are given: "
                "have one for each, or leave them out to have them put in front"
            )
        named += found
    if named == images + videos:
        return prompt
    if named:
        raise ValueError(
            "prompt has tokens for its images or its videos alone: have them for both, or neither"
        )
    if getattr(processor, "chat_template", None):
        visual = [{"type": "image"}] * images + [{"type": "video"}] * videos
        content = [*visual, {"type": "text", "text": prompt}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    image = (image_text or processor.image_token) if images else ""
    video = processor.video_token if videos else ""
    return f"{image * images}{video * videos} {prompt}"


def inputs_of(
    processor: Any,
    text: str | list[str],
    images: Sequence[Image.Image],
    videos: Sequence[list[Image.Image] | str],
    embedded: Architecture | None,
) -> Any:
    """Make a model's inputs of a prompt, or of several; an embedded model gets images stretched to the size it knows."""
    if embedded is not None:
        images = [image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for image in images]
    visual: dict[str, Any] = {"images": list(images)} if images else {}
    if videos:
        visual["videos"] = list(videos)
        if not any(isinstance(video, str) for video in videos):
            visual["do_sample_frames"] = False  # the caller chose the frames, and nothing says their rate
    return processor(text=text, return_tensors="pt", **visual)
