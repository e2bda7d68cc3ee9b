"""Tiny models whose vision tower is run, prompts with images and videos for them, and what their towers tell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from . import families, tiny
from .oracle import core_of
from .tiny import BOS, IMAGE, PAD, PATCH, VIDEO

MERGE = 2
# Models that get the frames, rows and columns of each image and video; the last of them in transformers 5 alone.
GRID_MODELS = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    *(
        ("qwen3_5", "minimax_m3_vl", "lfm3_vl")
        if Version(transformers.__version__) >= Version("5.24")
        else ()
    ),
)


def family(name: str) -> PreTrainedModel:
    """A tiny model of a type of `families`, whose tower has a layer without windows if any has."""
    config = families.config_of(name)
    if hasattr(config.vision_config, "fullatt_block_indexes"):
        config.vision_config.fullatt_block_indexes = [1]
        config.vision_config.window_size = 2 * MERGE * PATCH
    kind = getattr(transformers, families.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    return tiny.seed_weights(kind._from_config(config, attn_implementation="eager"))


@contextlib.contextmanager
def captured(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Outputs of ``modules``, in the order of the calls."""
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


Picture = tuple[str, tuple[int, int, int]]  # what it is; its frames, rows and columns of patches
PICTURES: tuple[tuple[Picture, ...], ...] = (
    (("image", (1, 6, 8)),),
    (("image", (1, 4, 10)), ("video", (2, 4, 6)), ("image", (1, 10, 6))),
)


def grid_model(name: str) -> PreTrainedModel:
    config = families.config_of(name)
    if hasattr(config.vision_config, "fullatt_block_indexes"):
        config.vision_config.depth = 3
        config.vision_config.fullatt_block_indexes = [1]
        config.vision_config.window_size = 2 * MERGE * PATCH  # two merged tokens
    kind = getattr(transformers, families.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    return tiny.seed_weights(kind._from_config(config, attn_implementation="sdpa"))


def grid_prompt(
    model: PreTrainedModel, samples: tuple[tuple[Picture, ...], ...] = PICTURES
) -> dict[str, Tensor]:
    """Prompts with pictures of given grids, and random pixels for them, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    config = model.config
    # GLM has placeholders of images in its videos. There, and in Qwen3, a frame of a video is one picture among the tokens.
    video = IMAGE if "glm" in config.model_type else VIDEO
    apart = "qwen3" in config.model_type or video == IMAGE
    start, end = (getattr(config, f"vision_{end}_token_id", 9) for end in ("start", "end"))
    rows, pixels, grids = [], {"image": [], "video": []}, {"image": [], "video": []}
    for pictures in samples:
        row = [BOS, 7, 8]
        for kind, (frames, height, width) in pictures:
            tokens = [IMAGE if kind == "image" else video] * (height * width // MERGE**2)
            for _ in range(frames if apart else 1):
                row += [9, start, *tokens * (1 if apart else frames), end]
            pixels[kind].append(torch.randn(frames * height * width, 3 * 2 * PATCH**2, generator=generator))
            grids[kind].append((frames, height, width))
        rows.append([*row, 10, 11])
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), **families._companions(model, ids)}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if pixels[kind]:
            inputs[f"pixel_values{suffix}"] = torch.cat(pixels[kind])
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
        else:
            inputs.pop(f"{kind}_grid_thw", None)
    if not pixels["image"] and "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = 2 * (ids == video).int()
    return inputs


@dataclass
class Eager:
    """An attention function that writes its weights down."""

    module: nn.Module
    weights: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        logits = query @ key.transpose(-1, -2) * scaling
        weights = (logits if attention_mask is None else logits + attention_mask).softmax(dim=-1)
        if module is self.module:
            self.weights.append(weights[0])  # [H, S, S]
            self.keys.append(key[0].transpose(0, 1).flatten(1))  # [S, H * D]
        return (weights @ value).transpose(1, 2), None


def told_by_eager(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the tower of a model of `GRID_MODELS` tells of the visual tokens, by eager attention: [F, ...], images first."""
    owner = core_of(model)[0]
    if hasattr(owner, "visual"):
        tower, projector = owner.visual, owner.visual.merger
        layers, attention = (
            tower.blocks,
            tower.blocks[1 if hasattr(tower, "fullatt_block_indexes") else -1].attn,
        )
    else:
        tower, projector = owner.vision_tower, owner.multi_modal_projector
        layers, attention = tower.layers, tower.layers[-1].self_attn
    before = tower.config._attn_implementation
    told: dict[str, list[Tensor]] = {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        if f"{kind}_grid_thw" not in inputs:
            continue
        eager = Eager(attention)
        AttentionInterface.register("written_down", eager)
        tower.set_attn_implementation("written_down")
        with captured([*layers, projector]) as outputs, torch.no_grad():
            encode = getattr(owner, f"get_{kind}_features")
            run = encode(inputs[f"pixel_values{suffix}"], inputs[f"{kind}_grid_thw"])
        tower.set_attn_implementation(before)
        *states, merged = outputs
        states = [state.squeeze(0) for state in states[len(layers) - 1 - len(layers) // 3 :]]
        patches = {
            "received": torch.cat([weights.mean(dim=(0, 1)) for weights in eager.weights]),
            "keys": torch.cat(eager.keys),
            "key_norm": torch.cat(eager.keys).norm(dim=-1),
            "similarity": torch.stack(states).mean(dim=0),
        }
        final = getattr(run, "pooler_output", run)
        final = (
            final[0] if isinstance(final[0], tuple) else final
        )  # transformers 4: with deepstack features behind
        # The tower puts what its merger made back into raster order.
        order = torch.cdist(torch.cat(list(final)).double(), merged.double()).argmin(dim=1)
        assert hasattr(tower, "fullatt_block_indexes") == (not torch.equal(order, torch.arange(len(order))))
        for need, rows in patches.items():
            told.setdefault(need, []).append(rows.unflatten(0, (-1, MERGE**2)).mean(dim=1)[order])
    return {need: torch.cat(parts) for need, parts in told.items()}
