"""What an engine may do that was never tried with pruned images, and why it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..vision_tower.finding import earlier_layers

# What to call it, how it shows in vLLM's configuration, and the reason.
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "model runner V2",
        lambda c: c.use_v2_model_runner,
        "no GPU has shown yet that it reads the ids; set VLLM_USE_V2_MODEL_RUNNER=0",
    ),
    (
        "mm_encoder_tp_mode='data'",
        lambda c: c.model_config.multimodal_config.mm_encoder_tp_mode == "data",
        "images are then encoded past the layer that scores; leave it at 'weights'",
    ),
    (
        "cudagraph_mm_encoder",
        lambda c: c.compilation_config.cudagraph_mm_encoder,
        "a CUDA graph of the encoder goes past the choice; leave it off",
    ),
    (
        "compile_mm_encoder",
        lambda c: c.compilation_config.compile_mm_encoder,
        "never tried: the scoring layer is watched by a hook; leave it off",
    ),
    (
        "video_pruning_rate",
        lambda c: bool(c.model_config.multimodal_config.video_pruning_rate),
        "that is vLLM's own pruning of videos, after which text has other ids; leave it out, 'gap' says what videos keep",
    ),
    (
        "a LLaVA with another tower than its own",
        lambda c: _tried(c) is not None and c.model_config.hf_config.vision_config.model_type != _tried(c)[0],
        "Pixtral's puts tokens between the rows of an image, and others were never tried; use CLIP's for LLaVA-1.5 and "
        "LLaVA-NeXT, and SigLIP's for LLaVA-OneVision",
    ),
    (
        "a LLaVA whose decoder gets a CLS token, or not all patches",
        lambda c: (
            _tried(c) is not None and c.model_config.hf_config.vision_feature_select_strategy != _tried(c)[1]
        ),
        "a CLS token has no place in the image; use vision_feature_select_strategy='default' for CLIP's tower, and "
        "'full' for SigLIP's, which has none",
    ),
    (
        "a LLaVA that takes features of several layers",
        lambda c: isinstance(getattr(c.model_config.hf_config, "vision_feature_layer", 0), (list, tuple)),
        "never tried: one layer scores; use a vision_feature_layer that is an int",
    ),
    (
        "a LLaVA that takes features of one of its tower's first layers",
        lambda c: _tried(c) is not None and _takes_first_layers(c.model_config.hf_config),
        "never tried: what scores beside that layer would come after it; use a vision_feature_layer behind these",
    ),
    (
        "enable_mm_embeds",
        lambda c: c.model_config.multimodal_config.enable_mm_embeds,
        "nothing is known of the encoder that made them; pass images",
    ),
    (
        "enable_prompt_embeds",
        lambda c: c.model_config.enable_prompt_embeds,
        "never tried: images are found by their placeholders; pass tokens",
    ),
    (
        "speculative decoding",
        lambda c: c.speculative_config is not None,
        "drafts read the ids one token ahead, which may wait for an image still; leave it off",
    ),
    ("LoRA", lambda c: c.lora_config is not None, "never tried; merge it into the weights"),
    ("kv_transfer_config", lambda c: c.kv_transfer_config is not None, "never tried; leave it out"),
    ("ec_transfer_config", lambda c: c.ec_transfer_config is not None, "never tried; leave it out"),
    (
        "data_parallel_size above 1",
        lambda c: c.parallel_config.data_parallel_size > 1,
        "never tried; start one engine for each replica",
    ),
    (
        "context parallelism",
        lambda c: (
            c.parallel_config.prefill_context_parallel_size > 1
            or c.parallel_config.decode_context_parallel_size > 1
        ),
        "never tried; leave it at 1",
    ),
)


# What was tried of each: the type of the tower, and which of its rows become features.
LLAVAS = {
    "llava": ("clip_vision_model", "default"),
    "llava_next": ("clip_vision_model", "default"),
    "llava_onevision": ("siglip_vision_model", "full"),
}


def _takes_first_layers(config: Any) -> bool:
    state, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(state, int):
        return False
    # State 0 enters the first layer.
    layer = state + layers if state < 0 else state - 1
    return layer < max(earlier_layers(range(layers), layers).values())


def _tried(config: Any) -> Any:
    return LLAVAS.get(getattr(config.model_config.hf_config, "model_type", ""))


def reasons_against(config: Any) -> list[str]:
    """Return a sentence for each thing that an engine of this configuration does and that is refused."""
    return [f"{name} is refused: {reason}" for name, does, reason in REFUSED if does(config)]
