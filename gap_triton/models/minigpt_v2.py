"""MiniGPT-v2 (arXiv 2310.09478): EVA ViT-g at 448 pixels, four patches in a row to one of 256 tokens, Llama-2-chat 7B.

Layout, read in the authors' code (github.com/Vision-CAIR/MiniGPT-4, ``minigpt4/models`` and ``runners``): the checkpoint's
``"model"`` holds what was trained, ``llama_proj.weight`` and ``.bias`` (5632 -> 4096) and LoRA matrices of every q_proj and
v_proj below ``llama_model.base_model.model.model.layers``, and buffers. Llama-2 and EVA ViT-g are files of their own. The
layer norm after the tower, ``ln_vision``, is frozen there and read from nowhere, so it is the identity scale unless the
checkpoint holds it. What could not be verified, because the released files were not at hand: the exact LoRA key
(``lora_A.weight`` in peft 0.2, ``lora_A.default.weight`` later; both are read), and which blocks and heads
``eva_vit_g.pth`` has beyond the 39 blocks that are used (later blocks, ``norm``, ``fc_norm`` and ``head`` are passed over).
"""

from __future__ import annotations

import re
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import Blip2VisionConfig, Blip2VisionModel, LlamaForCausalLM

from .visual_decoder import IMAGE_TOKEN, Tower, VisualDecoder, load_exactly, refuse_keys

IMAGE_SIZE, PATCHES_PER_TOKEN, VISUAL_TOKENS = 448, 4, 256
LAYER_NORM_EPS = 1e-5  # of ln_vision; the tower's own norms have 1e-6
LORA_TARGETS = ("q_proj", "v_proj")
IMAGE = "<ImageHere>"

LLAMA_PREFIX = "llama_model.base_model.model."
LAYER_NORM = "ln_vision."
PROJECTOR = "llama_proj."
UNUSED_BY_THE_TOWER = ("norm.", "fc_norm.", "head.")
# Names in the EVA file, and in transformers' Blip2VisionModel, which is the same tower.
EVA_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)


class EvaPatches(Tower):
    """Patch features of EVA ViT-g, those of four neighbours in a row side by side."""

    patches_per_token = PATCHES_PER_TOKEN

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map [I, 3, H, W] to [I, N / 4, 4 F], row by row."""
        patches = self.model(pixel_values).last_hidden_state[:, 1:]
        images, count, channels = patches.shape
        return patches.reshape(images, count // PATCHES_PER_TOKEN, PATCHES_PER_TOKEN * channels)

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int] | None:
        """Map [I, 3, 448, 448] to (32, 8): the rows of the patches, and a quarter of their columns."""
        rows, columns = super().grid(pixel_values) or (0, 0)
        return None if columns % PATCHES_PER_TOKEN else (rows, columns // PATCHES_PER_TOKEN)


def load(
    checkpoint: str | PathLike[str],
    llama: str | PathLike[str],
    eva: str | PathLike[str],
    *,
    vision_config: Blip2VisionConfig | None = None,
    lora_alpha: float = 16,
    dtype: torch.dtype = torch.float16,
    attn_implementation: str = "sdpa",
) -> VisualDecoder:
    """Read a MiniGPT-v2 checkpoint and merge its LoRA matrices into Llama-2.

    Args:
        checkpoint: File as the authors' training saves it.
        llama: Folder or hub id of Llama-2-chat 7B in the format of transformers.
        eva: The file ``eva_vit_g.pth`` of BLIP-2.
        vision_config: Shape of the tower, None = that of EVA ViT-g at 448 pixels.
        lora_alpha: LoRA matrices are scaled by ``lora_alpha / r``; the checkpoint does not hold it.
        dtype: Of all weights.
        attn_implementation: Of the decoder; ``"gap_triton"`` prunes.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: Keys of a file are missing or unknown, or of another shape; the message lists them.
    """
    decoder = LlamaForCausalLM.from_pretrained(llama, dtype=dtype, attn_implementation=attn_implementation)
    config = vision_config if vision_config is not None else Blip2VisionConfig(image_size=IMAGE_SIZE)
    tower = Blip2VisionModel(config)
    tower.post_layernorm.eps = LAYER_NORM_EPS
    projector = nn.Linear(config.hidden_size * PATCHES_PER_TOKEN, decoder.config.hidden_size)

    source = f"The MiniGPT-v2 checkpoint {checkpoint}"
    trained = _read(checkpoint)
    if "model" not in trained:
        raise ValueError(f"{source} holds {', '.join(map(str, trained))}: expected a 'model'")
    lora, norm, linear = _sort(trained["model"], decoder.config.num_hidden_layers, source)
    if not norm:
        norm = {"weight": torch.ones(config.hidden_size), "bias": torch.zeros(config.hidden_size)}
    tower_state = _tower_state(_read(eva), config) | {f"post_layernorm.{key}": norm[key] for key in norm}
    load_exactly(tower, tower_state, f"The EVA file {eva}")
    load_exactly(projector, linear, source)
    _merge(decoder, lora, lora_alpha, source)
    return VisualDecoder(EvaPatches(tower).to(dtype), projector.to(dtype), decoder).eval()


def prompt_ids(tokenizer: Any, text: str, visual_tokens: int = VISUAL_TOKENS) -> torch.Tensor:
    """Return the token ids of a prompt in which ``<ImageHere>`` stands for an image.

    The authors' evaluation asks ``<s>[INST] <Img><ImageHere></Img> [refer] give me the location of NAME [/INST]`` and gets
    boxes ``{<x0><y0><x1><y1>}`` in hundredths of the image. As there, the pieces of text between images are tokenized
    one by one, and the first one only gets the tokenizer's special tokens.

    Args:
        tokenizer: Llama-2's.
        text: The whole prompt.
        visual_tokens: Per image.

    Returns:
        [1, Q] int64, ``-1`` at visual tokens.
    """
    first, *others = text.split(IMAGE)
    ids = list(tokenizer(first).input_ids)
    for piece in others:
        ids += [IMAGE_TOKEN] * visual_tokens + list(tokenizer(piece, add_special_tokens=False).input_ids)
    return torch.tensor([ids])


def _read(path: str | PathLike[str]) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


State = dict[str, torch.Tensor]


def _sort(state: State, layers: int, source: str) -> tuple[State, State, State]:
    """LoRA matrices by name in the decoder, ``ln_vision`` and ``llama_proj`` out of ``checkpoint["model"]``."""
    state = {
        key.replace(".default.weight", ".weight"): value
        for key, value in state.items()
        if not key.endswith("rotary_emb.inv_freq")
    }
    lora = [
        f"{LLAMA_PREFIX}model.layers.{layer}.self_attn.{target}.lora_{side}.weight"
        for layer in range(layers)
        for target in LORA_TARGETS
        for side in "AB"
    ]
    linear = [PROJECTOR + "weight", PROJECTOR + "bias"]
    norm = [LAYER_NORM + "weight", LAYER_NORM + "bias"]
    required = {*lora, *linear, *(norm if state.keys() & set(norm) else ())}
    refuse_keys(source, missing=required - state.keys(), unexpected=state.keys() - required)

    def part(keys: list[str], prefix: str) -> State:
        return {key.removeprefix(prefix): state[key] for key in keys if key in state}

    return part(lora, LLAMA_PREFIX), part(norm, LAYER_NORM), part(linear, PROJECTOR)


@torch.no_grad()
def _merge(decoder: LlamaForCausalLM, lora: State, alpha: float, source: str) -> None:
    """Add ``alpha / r`` B A to each weight, in float32."""
    for key, lora_a in lora.items():  # A: [r, in]
        name, _, side = key.removesuffix(".weight").rpartition(".")
        if side != "lora_A":
            continue
        lora_b = lora[f"{name}.lora_B.weight"]  # [out, r]
        weight = decoder.get_parameter(f"{name}.weight")
        if (lora_b.shape[0], lora_a.shape[1]) != weight.shape or lora_b.shape[1] != lora_a.shape[0]:
            raise ValueError(
                f"{source} does not fit: {name} is {list(weight.shape)}, its LoRA matrices B {list(lora_b.shape)} and A "
                f"{list(lora_a.shape)}"
            )
        weight.copy_(weight.float() + alpha / lora_a.shape[0] * (lora_b.float() @ lora_a.float()))


def _tower_state(state: State, config: Blip2VisionConfig) -> State:
    """The EVA file under the names of `Blip2VisionModel`, its position embeddings resized to the tower's image."""
    renamed: State = {}
    for key, value in state.items():
        block = re.match(r"blocks\.(\d+)\.", key)
        unused = key.startswith(UNUSED_BY_THE_TOWER) or (block and int(block[1]) >= config.num_hidden_layers)
        if unused or key.endswith(".v_bias"):
            continue
        if key.endswith(".q_bias"):  # keys have no bias
            other = key.removesuffix("q_bias") + "v_bias"
            refuse_keys("The EVA file", missing={other} - state.keys(), unexpected=())
            key = key.removesuffix("q_bias") + "qkv.bias"
            value = torch.cat([value, torch.zeros_like(value), state[other]])
        for pattern, name in EVA_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    positions = "embeddings.position_embedding"
    if positions in renamed:
        renamed[positions] = _resize(renamed[positions], config.image_size // config.patch_size)
    return renamed


def _resize(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings [1, 1 + n * n, C] for a grid of ``side`` by ``side``, bicubic, class token first."""
    first, grid = positions.float().split([1, positions.shape[1] - 1], dim=1)
    before = round(grid.shape[1] ** 0.5)
    if before == side:
        return positions
    grid = grid.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
