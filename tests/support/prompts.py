"""Batches of prompts that the tests run on: padded on either side, ragged, without images, ending in one."""

from __future__ import annotations

import torch

from .tiny import Image, prompt

WIDE, TALL, LARGE = Image(24, 48), Image(48, 24), Image(48, 48)
BATCHES = {
    "even": {"before": (4, 4), "after": (6, 6), "images": ((Image(),), (Image(),))},
    "left-padded": {},
    "right-padded": {"padding": "right"},
    "ragged-images": {"images": ((Image(),), (Image(), Image(), Image()))},
    "one-without-image": {"images": ((), (Image(), Image()))},
    "ends-in-image": {"after": (-2, -2), "images": ((Image(),), (Image(),))},
    "single": {"images": ((Image(), Image()),), "before": (3,), "after": (5,)},
}


def make_prompt(name: str, batch: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """The prompts of `BATCHES` under the name ``batch``, for a model of `tiny`; some of several sizes of images."""
    options = dict(BATCHES[batch])
    if batch == "ends-in-image":
        inputs = prompt(name, after=(0, 0), images=options["images"], before=(3, 5), seed=seed)
        # Cut off the two words that follow the image.
        return inputs | {key: inputs[key][:, :-2] for key in ("input_ids", "attention_mask")}
    if not name.startswith("llava/") and name != "llava":
        options["images"] = tuple(
            tuple((Image(), WIDE, LARGE, TALL)[i % 4] for i in range(len(sample)))
            for sample in options.get("images", ((Image(),), (Image(),)))
        )
    return prompt(name, seed=seed, **options)
