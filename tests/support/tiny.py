"""Tiny vision-language models built from config, and prompts for them. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel

PAD, BOS, EOS, IMAGE, VIDEO = 0, 1, 2, 150, 151
LAYERS = 5
IMAGE_SIZE, PATCH = 24, 4
GRID = IMAGE_SIZE // PATCH  # 6 x 6 patches

TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}
PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48]]


def text_config(kind: str) -> transformers.PreTrainedConfig:
    if kind == "llama":
        return transformers.LlamaConfig(**TEXT)
    if kind == "qwen2":
        return transformers.Qwen2Config(**TEXT, use_sliding_window=False)
    if kind == "mistral":
        return transformers.MistralConfig(**TEXT, sliding_window=None)
    if kind.startswith("qwen2-"):  # such as qwen2-ffsss: full attention first, then sliding
        types = [{"f": "full_attention", "s": "sliding_attention"}[letter] for letter in kind[6:]]
        return transformers.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=30, layer_types=types)
    if kind == "mistral-sliding":
        return transformers.MistralConfig(**TEXT, sliding_window=30)
    raise ValueError(kind)


def config_of(name: str) -> transformers.PreTrainedConfig:
    model, _, text = name.partition("/")
    text = text_config(text or "llama")
    common = {"text_config": text, "vision_feature_layer": -1}
    if model == "llava":
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_index=IMAGE,
            vision_feature_select_strategy="default",
            **common,
        )
    if model == "llava_next":
        return transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_index=IMAGE,
            vision_feature_select_strategy="default",
            image_grid_pinpoints=PINPOINTS,
            **common,
        )
    if model == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**VISION),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=PINPOINTS,
            **common,
        )
    raise ValueError(name)


CLASSES = {
    "llava": transformers.LlavaForConditionalGeneration,
    "llava_next": transformers.LlavaNextForConditionalGeneration,
    "llava_onevision": transformers.LlavaOnevisionForConditionalGeneration,
}


def build(name: str = "llava", attn_implementation: str | dict[str, str] = "sdpa") -> PreTrainedModel:
    """A tiny model in eval mode, the same weights for the same name."""
    model = CLASSES[name.partition("/")[0]]._from_config(
        config_of(name), attn_implementation=attn_implementation
    )
    return seed_weights(model)


def seed_weights(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` in eval mode with random weights, large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                # Large enough for attention to be far from uniform: a selection then has clear winners.
                scale = 0.5 if "embed" in key else 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(noise * scale)
            else:
                # Norms multiply by their weight or, Gemma's, by one more than it; a fresh model tells which.
                ones = "norm" in key and key.endswith("weight") and bool(parameter.mean() > 0.5)
                parameter.copy_(ones + 0.1 * noise)
    return model.eval()


@dataclass
class Image:
    """One image of a prompt: its size in pixels (multiples of 24 up to 48)."""

    height: int = IMAGE_SIZE
    width: int = IMAGE_SIZE


def visual_tokens(name: str, image: Image) -> int:
    """Number of placeholder tokens that ``image`` takes."""
    model = name.partition("/")[0]
    if model == "llava":
        return GRID * GRID
    rows, columns = image.height // PATCH, image.width // PATCH
    return GRID * GRID + rows * (columns + 1)  # the overview, then the tiles with a newline per row


def prompt(
    name: str,
    images: Sequence[Sequence[Image]] = ((Image(),), (Image(),)),
    before: Sequence[int] = (3, 7),
    after: Sequence[int] = (5, 9),
    padding: str = "left",
    seed: int = 1,
) -> dict[str, torch.Tensor]:
    """A batch of prompts: bos, ``before`` words, the images with two words after each, ``after`` words."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(5, 140, (count,), generator=generator).tolist()

    samples = []
    for pictures, lead, tail in zip(images, before, after, strict=True):
        tokens = [BOS, *words(lead)]
        for picture in pictures:
            tokens += [IMAGE] * visual_tokens(name, picture) + words(2)
        samples.append(tokens + words(tail))
    width = max(map(len, samples))

    def padded(row: list[int], filler: int) -> list[int]:
        gap = [filler] * (width - len(row))
        return gap + row if padding == "left" else row + gap

    batch = {
        "input_ids": torch.tensor([padded(row, PAD) for row in samples]),
        "attention_mask": torch.tensor([padded([1] * len(row), 0) for row in samples]),
    }
    pictures = [picture for sample in images for picture in sample]
    if pictures:
        batch |= pixels(name, pictures, generator)
    return batch


def pixels(name: str, pictures: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random pixel values for ``pictures``, in the layout of the model."""
    if name.partition("/")[0] == "llava":
        return {"pixel_values": torch.randn(len(pictures), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    tiles = [1 + picture.height * picture.width // IMAGE_SIZE**2 for picture in pictures]
    values = torch.randn(len(pictures), max(tiles), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    sizes = torch.tensor([[picture.height, picture.width] for picture in pictures])
    return {"pixel_values": values, "image_sizes": sizes}


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int = 6, **kwargs: object):
    """Exactly ``tokens`` new tokens, greedy unless told otherwise, with the logits of every step."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD} | kwargs
    options["suppress_tokens"] = [IMAGE, VIDEO]  # a random model would write placeholders
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
