"""What the tests of the ways to generate run on: a model whose position ids have one axis, and one with M-RoPE."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

import gap_triton
from gap_triton import GapConfig

from . import tiny
from .oracle import NAME as ORACLE
from .oracle import MaskingOracle
from .prompts import make_prompt
from .tiny import IMAGE, TEXT, VIDEO, seed_weights

V5 = Version(transformers.__version__) >= Version("5")
MROPE = "qwen2_5_vl"
MODELS = ["llava", MROPE]
CONFIG = GapConfig(keep=0.4, layer=1)

START, END = VIDEO + 1, VIDEO + 2
GRID = (1, 12, 12)  # frames, rows and columns of patches; 2 x 2 of them make one of 36 visual tokens
PATCH = 4


def build(name: str, attn_implementation: str | dict[str, str] = "sdpa") -> PreTrainedModel:
    """A tiny model in eval mode, the same weights for the same name."""
    if name != MROPE:
        return tiny.build(name, attn_implementation)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {**TEXT, "use_sliding_window": False, ("rope_parameters" if V5 else "rope_scaling"): rope}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return seed_weights(
        transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation=attn_implementation
        )
    )


def make(name: str, batch: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """The prompts of `prompts.BATCHES`; a single prompt that ends in its image has a name of its own."""
    single = batch == "single-ends-in-image"
    inputs = make_prompt("llava" if name == MROPE else name, "ends-in-image" if single else batch, seed)
    if single:
        inputs = {key: value[1:] for key, value in inputs.items()}
    return as_mrope(inputs, seed) if name == MROPE else inputs


def as_mrope(inputs: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """A prompt of LLaVA with the tokens around each image, the pixels and the token types of Qwen2.5-VL."""
    ids = inputs["input_ids"].clone()
    visual = torch.nn.functional.pad(ids == IMAGE, (1, 1))
    ids[visual[:, 2:] & ~visual[:, 1:-1]] = START
    ids[visual[:, :-2] & ~visual[:, 1:-1]] = END
    new = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
    if V5:
        new["mm_token_type_ids"] = (ids == IMAGE).int()
    if "pixel_values" in inputs:
        images = len(inputs["pixel_values"])
        patches = images * GRID[0] * GRID[1] * GRID[2]
        generator = torch.Generator().manual_seed(seed)
        new["pixel_values"] = torch.randn(patches, 3 * 2 * PATCH**2, generator=generator)
        new["image_grid_thw"] = torch.tensor([GRID] * images)
    return new


def pair(
    name: str = "llava", config: GapConfig = CONFIG
) -> tuple[PreTrainedModel, PreTrainedModel, MaskingOracle]:
    """A pruned model, the same unpruned, and the oracle that runs it."""
    model = build(name, "gap_triton")
    gap_triton.configure(model, config)
    reference = build(name, {"text_config": ORACLE})
    return model, reference, MaskingOracle(reference, config.layer, config.keep, config.score)
