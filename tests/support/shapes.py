"""The shapes of `gap-triton bench` with few, narrow layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from gap_triton.latency import SHAPES, Subject


def small_subject(name: str, visual_tokens: int) -> Subject:
    """A shape of so many visual tokens, on the CPU, with two layers and few channels."""
    config, inputs = SHAPES[name].build(visual_tokens, 1, torch.device("cpu"))
    model_type = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    model = model_type._from_config(_small(config), attn_implementation="sdpa").eval()
    return Subject(name, model, inputs, visual_tokens)


def _small(config: Any) -> Any:
    """The config with few, narrow layers, and the same image."""
    for part in (config.text_config, config.vision_config):
        depth = "depth" if hasattr(part, "depth") else "num_hidden_layers"
        heads = "num_heads" if hasattr(part, "num_heads") else "num_attention_heads"
        for name, value in ((depth, 2), (heads, 2), ("hidden_size", 32), ("intermediate_size", 32)):
            setattr(part, name, value)
    config.text_config.num_key_value_heads, config.text_config.head_dim = 1, 16
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size, config.vision_config.fullatt_block_indexes = 32, [1]
        rope = "rope_parameters" if hasattr(config.text_config, "rope_parameters") else "rope_scaling"
        getattr(config.text_config, rope)["mrope_section"] = [2, 3, 3]
    else:
        config.vision_feature_layer = -1
    return config
