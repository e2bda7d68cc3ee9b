"""The entry point of ``vllm.general_plugins``."""

from __future__ import annotations

from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from .configure import GapConfigHook, GapLlavaConfigHook

MODELS = {
    "GapLlavaForConditionalGeneration": ("llava", GapLlavaConfigHook),
    "GapLlavaNextForConditionalGeneration": ("llava_next", GapLlavaConfigHook),
    "GapLlavaOnevisionForConditionalGeneration": ("llava_next", GapLlavaConfigHook),
    "GapQwen2VLForConditionalGeneration": ("qwen", GapConfigHook),
    "GapQwen2_5_VLForConditionalGeneration": ("qwen", GapConfigHook),
    "GapQwen3VLForConditionalGeneration": ("qwen", GapConfigHook),
    "GapQwen3_5ForConditionalGeneration": ("qwen", GapConfigHook),
}


def register() -> None:
    """Add the models to vLLM: it calls this in each of its processes, maybe several times."""
    known = ModelRegistry.get_supported_archs()
    for name, (module, hook) in MODELS.items():
        if name not in known:
            # By name: importing a model initialises a device, which must not happen before vLLM forks.
            ModelRegistry.register_model(name, f"{__package__}.{module}:{name}")
        MODELS_CONFIG_MAP.setdefault(name, hook)
