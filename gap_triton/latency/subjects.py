"""What is measured: a model and the inputs of one prefill. Random weights do where only time counts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, VISION_START, VISION_END, BOS = 3, 4, 5, 6, 1
FIRST_WORD = 10  # the ids below have a meaning of their own


@dataclass(frozen=True)
class Subject:
    """A model without pruning, and the inputs of a prefill.

    Attributes:
        name: How the user called it.
        model: On the device, under ``attn_implementation="sdpa"``, in eval mode.
        inputs: What its forward takes, on the device; no padding.
        visual_tokens: How many visual tokens a sample has.
    """

    name: str
    model: Any
    inputs: dict[str, Tensor]
    visual_tokens: int

    @property
    def batch(self) -> int:
        """B, the number of samples."""
        return self.inputs["input_ids"].shape[0]

    @property
    def prompt_tokens(self) -> int:
        """How many tokens a sample's prompt has, visual ones included."""
        return self.inputs["input_ids"].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.inputs["input_ids"].device


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder."""

    layers: int
    channels: int
    heads: int
    key_heads: int
    intermediate: int
    head_dim: int
    vocabulary: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a config in transformers."""
        return {
            "num_hidden_layers": self.layers, "hidden_size": self.channels, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads, "intermediate_size": self.intermediate, "head_dim": self.head_dim,
            "vocab_size": self.vocabulary, "max_position_embeddings": 131072, "pad_token_id": 0, "bos_token_id": BOS,
            "eos_token_id": 2,
        }  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model by its sizes.

    Attributes:
        about: One line for the help.
        visual_tokens: How many a sample has, unless said otherwise.
        build: Makes the config and the inputs of an image of that many visual tokens, for a batch on a device.
    """

    about: str
    visual_tokens: int
    build: Callable[[int, int, torch.device], tuple[Any, dict[str, Tensor]]]


LLAMA_7B = Decoder(32, 4096, 32, 32, 11008, 128, 32064)
QWEN_7B = Decoder(28, 3584, 28, 4, 18944, 128, 152064)
SMOL = Decoder(30, 576, 9, 3, 1536, 64, 49152)
CLIP_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
    "projection_dim": 768,
}  # fmt: skip
# Small, so that the decoder is what is measured.
CLIP_SMALL = {
    "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 14,
    "projection_dim": 192,
}  # fmt: skip
TILES = 5
"""Of LLaVA-NeXT: an overview, and two by two tiles of the same size."""


def square_side(visual_tokens: int) -> int:
    """The side of a square of ``visual_tokens``.

    Raises:
        ValueError: There is no such square.
    """
    side = round(visual_tokens**0.5)
    if side < 1 or side * side != visual_tokens:
        raise ValueError(
            f"visual_tokens={visual_tokens}: an image is a square of tokens here, so expected a square number such as "
            f"{max(side, 1) ** 2} or {(side + 1) ** 2}"
        )
    return side


def _words(batch: int, count: int, vocabulary: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_WORD, vocabulary, (batch, count), generator=generator).to(device)


def _pixels(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device)


def _prompt(
    batch: int, visual: list[int], vocabulary: int, device: torch.device, words: int
) -> dict[str, Tensor]:
    """An image, and ``words`` tokens of text behind it."""
    image = torch.tensor([BOS, *visual], device=device).expand(batch, -1)
    input_ids = torch.cat([image, _words(batch, words, vocabulary, device)], 1)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


WORDS = 48
"""Tokens of text in a prompt."""


def _llava(decoder: Decoder, tower: dict[str, int]) -> Callable[..., tuple[Any, dict[str, Tensor]]]:
    def build(visual_tokens: int, batch: int, device: torch.device) -> tuple[Any, dict[str, Tensor]]:
        size = square_side(visual_tokens) * tower["patch_size"]
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**decoder.arguments),
            vision_config=transformers.CLIPVisionConfig(image_size=size, **tower),
            image_token_index=IMAGE,
        )
        inputs = _prompt(batch, [IMAGE] * visual_tokens, decoder.vocabulary, device, WORDS)
        return config, inputs | {"pixel_values": _pixels(batch, 3, size, size, device=device)}

    return build


def _llava_next(visual_tokens: int, batch: int, device: torch.device) -> tuple[Any, dict[str, Tensor]]:
    """An overview and four tiles of 24 x 24, with a newline token behind each row of the 48 x 48 that the tiles make."""
    side = 24
    expected = side * side + 2 * side * (2 * side + 1)
    if visual_tokens != expected:
        raise ValueError(f"visual_tokens={visual_tokens}: llava-next-7b has an image of {expected} tokens")
    size = side * CLIP_LARGE["patch_size"]
    config = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(**LLAMA_7B.arguments),
        vision_config=transformers.CLIPVisionConfig(image_size=size, **CLIP_LARGE),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[2 * size, 2 * size]],
    )
    inputs = _prompt(batch, [IMAGE] * visual_tokens, LLAMA_7B.vocabulary, device, WORDS)
    return config, inputs | {
        "pixel_values": _pixels(batch, TILES, 3, size, size, device=device),
        "image_sizes": torch.tensor([[2 * size, 2 * size]] * batch, device=device),
    }


def _qwen2_5_vl(visual_tokens: int, batch: int, device: torch.device) -> tuple[Any, dict[str, Tensor]]:
    side, merge, patch = 2 * square_side(visual_tokens), 2, 14
    text = QWEN_7B.arguments | {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    text.pop("head_dim")
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": patch,
                       "spatial_merge_size": merge, "out_hidden_size": QWEN_7B.channels},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip
    visual = [VISION_START, *[IMAGE] * visual_tokens, VISION_END]
    inputs = _prompt(batch, visual, QWEN_7B.vocabulary, device, WORDS)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return config, inputs | {
        "pixel_values": _pixels(batch * side * side, 3 * 2 * patch * patch, device=device),
        "image_grid_thw": torch.tensor([[1, side, side]] * batch, device=device),
    }


SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Shape("LLaVA-1.5 7B, 576 visual tokens", 576, _llava(LLAMA_7B, CLIP_LARGE)),
    "llava-next-7b": Shape("LLaVA-NeXT 7B, an overview and four tiles, 2,928 visual tokens", 2928, _llava_next),
    "qwen2.5-vl-7b": Shape("Qwen2.5-VL 7B, an image of 4,096 visual tokens", 4096, _qwen2_5_vl),
    "smol": Shape("a decoder of the size of SmolLM2-135M behind a small CLIP, 576 visual tokens", 576,
                  _llava(SMOL, CLIP_SMALL)),
}  # fmt: skip


def random_subject(
    name: str, *, visual_tokens: int | None, batch: int, device: torch.device, dtype: torch.dtype
) -> Subject:
    """Build one of `SHAPES` with random weights.

    Args:
        name: Its name.
        visual_tokens: How many a sample has; None: as many as the shape says.
        batch: B, the number of samples, each with an image of its own.
        device: Where.
        dtype: Of the weights.

    Raises:
        ValueError: There is no such shape, no such image, or no room for the weights.
    """
    if name not in SHAPES:
        raise ValueError(f"config {name!r}: expected one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    count = shape.visual_tokens if visual_tokens is None else visual_tokens
    config, inputs = shape.build(count, batch, device)
    model_type = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in model_type(config).parameters()) * dtype.itemsize
    _refuse_what_does_not_fit(name, weights, device, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = model_type._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return Subject(name, model, inputs, count)


def _refuse_what_does_not_fit(name: str, weights: int, device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights > room:
        gib = 1 << 30
        raise ValueError(
            f"{name} has {weights / gib:.1f} GiB of weights in {dtype}, and {device} has room for {room / gib:.1f} GiB: "
            "use a smaller dtype, a smaller config or another device"
        )
