"""Tiny models whose vision tower is run."""

from __future__ import annotations

import transformers
from transformers import PreTrainedModel

from . import families, tiny
from .tiny import PATCH

MERGE = 2


def family(name: str) -> PreTrainedModel:
    """A tiny model of a type of `families`, whose tower has a layer without windows if any has."""
    config = families.config_of(name)
    if hasattr(config.vision_config, "fullatt_block_indexes"):
        config.vision_config.fullatt_block_indexes = [1]
        config.vision_config.window_size = 2 * MERGE * PATCH
    kind = getattr(transformers, families.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
    return tiny.seed_weights(kind._from_config(config, attn_implementation="eager"))
