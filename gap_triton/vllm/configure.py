"""What vLLM calls when it has read an engine's configuration: refuse what was never tried, and adapt what must be."""

from __future__ import annotations

import math
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from .options import options_of
from .refusals import reasons_against

OURS = "Gap"
"""What the names of our architectures begin with."""


class GapConfigHook(VerifyAndUpdateConfig):
    """For every model."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the options.

        Raises:
            ValueError: There are none, or they are wrong.
        """
        _hook_of_vllm(model_config).verify_and_update_model_config(model_config)
        options_of(_gap_of(model_config))

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the engine, and let it count images as it does unpruned.

        Raises:
            ValueError: The engine does what was never tried with pruned images; the message has all of it.
        """
        _hook_of_vllm(vllm_config.model_config).verify_and_update_config(vllm_config)
        reasons = reasons_against(vllm_config)
        if reasons:
            raise ValueError("gap_triton in vLLM: " + "; ".join(reasons))
        keep: Any = options_of(_gap_of(vllm_config.model_config)).config.keep
        if isinstance(keep, float):
            # The scheduler counts survivors: with the same budget it would encode 1 / keep times as many images before the
            # decoder sees the first of them, and the first request of a burst would wait for all.
            scheduler: Any = vllm_config.scheduler_config
            scheduler.max_num_encoder_input_tokens = math.ceil(keep * scheduler.max_num_encoder_input_tokens)


class GapLlavaConfigHook(GapConfigHook):
    """For models whose decoder has one axis of ids."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Check the options, and let vLLM ask the model for its ids."""
        GapConfigHook.verify_and_update_model_config(model_config)
        # Its presence and length are all that is read, and on the outer configuration by the runner alone. The decoder keeps
        # its own RoPE: with this in the text's configuration it would build one of three axes.
        model_config.hf_config.rope_parameters = {"rope_type": "default", "mrope_section": [0, 0, 0]}


def _hook_of_vllm(model_config: ModelConfig) -> type[VerifyAndUpdateConfig]:
    """What vLLM itself calls for the model that ours is made of: it looks by name, and ours has another."""
    name = model_config.architecture.removeprefix(OURS)
    return MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)


def _gap_of(model_config: ModelConfig) -> Any:
    gap = getattr(model_config.hf_config, "gap", None)
    if gap is None:
        raise ValueError(
            "hf_overrides has no 'gap', which says what to keep of an image: pass hf_overrides={'architectures': [...], "
            "'gap': {'keep': 0.5, 'score': 'received'}}"
        )
    return gap
