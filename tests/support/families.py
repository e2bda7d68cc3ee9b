"""Every image-text-to-text type of the installed transformers, tiny, with random weights, built from its own config.

Sizes are shrunk by field name, so a new type needs no code here unless its config is peculiar. Vision towers are built
but mostly not run: visual features are put where the placeholder tokens are embedded, which is where a vision tower's
output goes, so a decoder can't tell the difference. `test_vision.py` runs vision towers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .oracle import core_of
from .tiny import BOS, EOS, IMAGE, LAYERS, PAD, VIDEO, seed_weights

if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    # The forward of Llama 4 in transformers 5.24 reads a field that the output of its decoder lacks, and fails.
    MoeCausalLMOutputWithPast.image_outputs = None

TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
WINDOW = 24
HIDDEN = 64
GRID = (1, 6, 8)  # frames, rows, columns of patches; 2 x 2 patches make one token
MIXED = ["full_attention", "sliding_attention"] * (LAYERS // 2) + ["full_attention"] * (LAYERS % 2)

TEXT_SIZES = {
    "vocab_size": 200,
    "vocab_size_per_layer_input": 200,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    # experts
    "moe_intermediate_size": 32,
    "moe_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    # linear attention
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
}
VISION_SIZES = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": 24,
    "patch_size": 4,
    "num_channels": 3,
    "out_hidden_size": HIDDEN,
    "projection_dim": HIDDEN,
    "projection_hidden_dim": 32,
    "image_token_embed_dim": 32,
    "num_embeddings": 64,
    "codebook_size": 64,
    "base_channels": 32,
    "vocab_size": 200,
    "moe_intermediate_size": 32,
    "num_local_experts": 4,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": HIDDEN,
    "max_img_size": 64,
}
OUTER_SIZES = {"projection_dim": HIDDEN, "projector_hidden_size": HIDDEN, "mm_tokens_per_image": 9}
TEXT_NAMES = ("text_config", "language_config", "llm_config", "decoder_config")
IMAGE_FIELDS = ("image_token_id", "image_token_index")
VIDEO_FIELDS = ("video_token_id", "video_token_index")
# Other special tokens of a vocabulary of 200, next to IMAGE and VIDEO.
SPECIAL_FIELDS = (
    "vision_start_token_id",
    "vision_end_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "video_start_token_id",
    "video_end_token_id",
    "boi_token_id",
    "boi_token_index",
    "eoi_token_id",
    "eoi_token_index",
    "audio_token_id",
    "audio_token_index",
)


# --------------------------------------------------------------------------------------------- configs
def shrink(config: PretrainedConfig, name: str | None = None) -> PretrainedConfig:
    """Make ``config`` and the configs in it tiny, in place; ``name`` is the field that holds it, None for the whole."""
    inner = {key: value for key, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    text = name in TEXT_NAMES or (name is None and not any(key in TEXT_NAMES for key in inner))
    sizes = TEXT_SIZES if text else OUTER_SIZES if name is None else VISION_SIZES
    for key, value in sizes.items():
        _replace(config, key, value)
    _shrink_layer_types(config, LAYERS if text else 2)
    for key in IMAGE_FIELDS:
        _replace(config, key, IMAGE, only=int)
    for key in VIDEO_FIELDS:
        _replace(config, key, VIDEO, only=int)
    for token, key in enumerate(SPECIAL_FIELDS, start=VIDEO + 1):
        _replace(config, key, token, only=int)
    if name is None:
        for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_size"):
            _replace(config, key, TEXT_SIZES[key], only=int)
    for key, value in inner.items():
        shrink(value, key)
    return config


def _replace(config: PretrainedConfig, key: str, value: int, only: type = object) -> None:
    # Configs refuse some fields in their own ways: read-only properties, values that differ by layer.
    with contextlib.suppress(Exception):
        current = getattr(config, key)
        if isinstance(current, only) and (current is not None or key.endswith("token_id")):
            many = isinstance(current, (list, tuple))
            setattr(config, key, type(current)([value] * len(current)) if many else value)


def _shrink_layer_types(config: PretrainedConfig, layers: int) -> None:
    """The kinds of layers that the config has, in turn."""
    for key in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(getattr(config, key, None) or ()))
        if kinds and len(getattr(config, key)) != layers:
            setattr(config, key, [kinds[i % len(kinds)] for i in range(layers)])


def _text(config: PretrainedConfig, **fields: Any) -> None:
    for key, value in fields.items():
        setattr(config.text_config, key, value)


def _vision_start(config: PretrainedConfig) -> None:
    # The released thinkers carry it in their JSON; the default config leaves it to the model around the thinker.
    config.vision_start_token_id, config.vision_end_token_id = VIDEO + 1, VIDEO + 2


def _mrope(*section: int, **fields: Any) -> Callable[[PretrainedConfig], None]:
    """Rotary frequencies of a head of 16 split over the axes as ``section``."""

    def set_rope(config: PretrainedConfig) -> None:
        text = config.text_config
        rope = {"rope_type": "default", "mrope_section": list(section), **fields}
        if hasattr(text, "rope_parameters"):
            text.rope_parameters = {"rope_theta": 10_000.0, **rope}
        else:
            text.rope_scaling = rope

    return set_rope


QWEN_VL = _mrope(2, 3, 3)


def _qwen3_vl(config: PretrainedConfig) -> None:
    _mrope(2, 3, 3, mrope_interleaved=True)(config)
    config.vision_config.deepstack_visual_indexes = [0, 1]  # each layer of the vision tower


GLM = _mrope(2, 3, 3, partial_rotary_factor=1.0)
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}  # few heads would tie at 0
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}

# What the sizes above do not settle.
PECULIAR: dict[str, Callable[[PretrainedConfig], Any]] = {
    "qwen2_vl": lambda config: (QWEN_VL(config), setattr(config.vision_config, "hidden_size", HIDDEN)),
    "qwen2_5_vl": QWEN_VL,
    "qwen2_5_omni_thinker": lambda config: (QWEN_VL(config), _vision_start(config)),
    "paddleocr_vl": QWEN_VL,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl,
    "qwen3_omni_moe_thinker": lambda config: (_qwen3_vl(config), _vision_start(config)),
    "cosmos3_omni": _qwen3_vl,
    "cosmos3_edge": QWEN_VL,
    "glm4v": GLM,
    "glm46v": GLM,
    "glmga": GLM,
    "glm_ocr": GLM,
    "glm4v_moe": _mrope(1, 1, 2, partial_rotary_factor=0.5),
    "deepseek_ocr2": lambda config: _text(
        config, mlp_layer_types=["dense"] + ["sparse"] * (LAYERS - 1), num_experts_per_tok=2
    ),
    "ernie4_5_vl_moe": _mrope(3, 3, 2),
    "cohere_compass": lambda config: setattr(config.vision_config, "deepstack_visual_indexes", [0, 1]),
    "hunyuan_vl": lambda config: (_mrope(2, 2, 2, 2)(config), _text(config, head_dim=16)),
    "kimi_k25": lambda config: (
        setattr(config, "projection_hidden_size", 32),
        _text(config, head_dim=8, num_key_value_heads=4),
    ),
    "mistral4": lambda config: setattr(config, "num_key_value_heads", 4),
    "molmo2": lambda config: setattr(config, "image_patch_id", IMAGE),
    "perception_lm": lambda config: setattr(config.vision_config, "model_args", {"embed_dim": 32}),
    "vipllava": lambda config: setattr(config, "vision_feature_layers", [-1, -2]),
    "step3p7": lambda config: _text(
        config,
        sliding_window=WINDOW,
        layer_types=MIXED,
        rope_parameters=dict.fromkeys(MIXED, PLAIN_ROPE),
    ),
    # As released; the default config names none of these layers.
    "lfm2_vl": lambda config: _text(config, layer_types=["conv", *["full_attention"] * (LAYERS - 1)]),
    "minimax_m3_vl": lambda config: (
        setattr(config, "merged_hidden_size", 4 * HIDDEN),
        _text(
            config,
            layer_types=["full_attention", *["minimax_m3_sparse"] * (LAYERS - 1)],
            index_n_heads=2,  # as many as there are key heads
            index_head_dim=16,
        ),
    ),
    "gemma4": lambda config: (
        setattr(config.vision_config, "pooling_kernel_size", 2),
        _text(config, num_kv_shared_layers=2),  # the last two attend to keys of layers 1 and 2
    ),
    "llama4": lambda config: (
        _text(config, attention_chunk_size=WINDOW),
        setattr(config.vision_config, "intermediate_size", 32 * 4),  # of 2 x 2 patches
        setattr(config.vision_config, "projector_input_dim", 32),
        setattr(config.vision_config, "projector_output_dim", 32),
        setattr(config.vision_config, "vision_output_dim", 32),
    ),
    # The default configs leave their placeholders to the tokenizer.
    **dict.fromkeys(
        ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
        lambda config: (setattr(config, "image_token_id", IMAGE), setattr(config, "video_token_id", VIDEO)),
    ),
    "nemotron_h_omni": lambda config: setattr(config, "image_token_id", IMAGE),
    # Indexers that choose fewer tokens than a prompt of the tests has.
    "mistral_large4": lambda config: _text(config, head_dim=8, num_key_value_heads=4),
    "dots3_note": lambda config: _text(config, num_key_value_heads=4),
    "hy_v4_vl": lambda config: _text(config, **INDEXER, head_dim=8, num_key_value_heads=4),
    "glm5_next": lambda config: _text(
        config,
        **INDEXER,
        head_dim=8,
        num_key_value_heads=4,
        index_kpool=2,
        linear_num_heads=4,
        linear_head_dim=8,
    ),
    **dict.fromkeys(
        ("inkling2", "inkling2_loop"),
        lambda config: _text(
            config,
            unpadded_vocab_size=200,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=16,
            rel_extent=64,
        ),
    ),
}


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
VOCABULARY = {"<image>": IMAGE} | {f"IMGIMG{letter}Z": 160 + i for i, letter in enumerate("ABCDEFGH")}
# Arguments without which the default config can't be made, or shrunk afterwards.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": VOCABULARY},
    "cohere_compass": {
        "text_config": {
            "num_hidden_layers": LAYERS,
            "layer_types": MIXED,
            "rope_parameters": {kind: PLAIN_ROPE | {"mrope_section": [2, 3, 3]} for kind in set(MIXED)},
        }
    },
    "diffusion_gemma": {
        "text_config": {
            "num_hidden_layers": LAYERS,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    },
    "dots3_note": {
        "text_config": {
            "num_hidden_layers": LAYERS,
            "qk_rope_head_dim": 8,
            **LATENT,
            **{f"swa_{name}": value for name, value in LATENT.items()},
            **INDEXER,
        }
    },
    "mistral_large4": {
        "text_config": {
            "num_hidden_layers": LAYERS,
            "qk_rope_head_dim": 8,
            **LATENT,
            **INDEXER,
            "kv_source_layers": [0, 1, 1, 3, 1],  # the fourth has no RoPE, and shares with none
        }
    },
    "emu3": {"vocabulary_map": VOCABULARY},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0], [-1, 2], [-1, 4]], "downsample_rate": "1/2"},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "ple_layer_ids": [1],
            "ple_embed_dim": 32,
            "ngram_vocab_size_base": 50,
            "hc_lowrank": 16,
            "eos_token_id": EOS,
            "vocab_size": 200,
            "num_hidden_layers": LAYERS,
        }
    },
    "vision-encoder-decoder": {
        "encoder": {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "decoder": {"model_type": "trocr", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2},
    },
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    # Their vision towers come from timm. No vision tower runs here, so any other will do.
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model"}},
    "perception_lm": {"vision_config": {"model_type": "siglip_vision_model"}},
}


def config_of(model_type: str) -> PretrainedConfig:
    config = shrink(CONFIG_MAPPING[model_type](**ARGUMENTS.get(model_type, {})))
    PECULIAR.get(model_type, lambda config: None)(config)
    return config


# --------------------------------------------------------------------------------------------- models
def build(model_type: str, attn_implementation: str | dict[str, str] | None = None) -> PreTrainedModel:
    """A tiny model of ``model_type`` in eval mode, the same weights for the same type.

    With ``attn_implementation`` None the decoder has sdpa, and the rest eager attention, which every vision tower has.
    """
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    model = getattr(transformers, name)._from_config(
        config_of(model_type), attn_implementation=attn_implementation or "eager"
    )
    if attn_implementation is None:
        with contextlib.suppress(LookupError, ValueError, AttributeError):
            core_of(model)[1].set_attn_implementation("sdpa")
    return seed_weights(model)


@contextlib.contextmanager
def visual_features(model: PreTrainedModel) -> Iterator[None]:
    """Random features in the place of placeholder embeddings, the same for the same position."""
    table = torch.randn(4, 512, HIDDEN, generator=torch.Generator().manual_seed(3)) * 0.5
    visual: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        visual[:] = [(ids == IMAGE) | (ids == VIDEO)]

    def fill(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if output.dim() != 3 or output.shape[1] == 1 or output.shape[:2] != visual[0].shape:
            return None
        return torch.where(visual[0][..., None], table[: output.shape[0], : output.shape[1]], output)

    # Some models look up the placeholders, others put a neutral token in their place first.
    handles = [
        core_of(model)[0].register_forward_pre_hook(look, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(fill),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------------------------- prompts
def visual_tokens(model_type: str) -> int:
    """Placeholders of one image of `GRID`: one per token; HunYuan ends each row of them with one more."""
    rows, columns = GRID[1] // 2, GRID[2] // 2
    return rows * (columns + (model_type in ("hunyuan_vl", "hy_v4_vl")))


def prompt(
    model: PreTrainedModel, padding: str = "left", placeholder: int = IMAGE, tokens: int | None = None
) -> dict[str, torch.Tensor]:
    """Two samples, one image in the first and two in the second, padded to one length; ``tokens`` for each image."""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> list[int]:
        return torch.randint(5, 140, (count,), generator=generator).tolist()

    config = model.config
    image = [placeholder] * (tokens or visual_tokens(config.model_type))
    start = getattr(config, "vision_start_token_id", None) or getattr(config, "image_start_token_id", None)
    end = getattr(config, "vision_end_token_id", None) or getattr(config, "image_end_token_id", None)
    if start is not None and end is not None:
        image = [start, *image, end]
    samples = [
        [BOS, *words(3), *image, *words(6)],
        [BOS, *words(4), *image, *words(2), *image, *words(9)],
    ]
    width = max(map(len, samples))
    rows, masks = [], []
    for sample in samples:
        gap = width - len(sample)
        filler, real = [PAD] * gap, [1] * len(sample)
        rows.append(filler + sample if padding == "left" else sample + filler)
        masks.append([0] * gap + real if padding == "left" else real + [0] * gap)
    ids, mask = torch.tensor(rows), torch.tensor(masks)
    return {"input_ids": ids, "attention_mask": mask} | _companions(model, ids)


def _companions(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What else the model wants to know of the placeholders in ``ids``: their kind, and the grid of each image."""
    wanted = inspect.signature(inspect.unwrap(type(core_of(model)[0]).forward)).parameters
    images, videos = (ids == IMAGE).int(), (ids == VIDEO).int()
    found: dict[str, torch.Tensor] = {}
    if "mm_token_type_ids" in wanted:
        found["mm_token_type_ids"] = images + 2 * videos
    if "moe_mm_token_type_ids" in wanted:
        found["moe_mm_token_type_ids"] = images | videos
    if "token_type_ids" in wanted:
        # PaliGemma marks the answer, of which a prompt has none; Gemma 3 marks images.
        found["token_type_ids"] = images * (model.config.model_type != "paligemma")
    for name, rows in (("image_grid_thw", images), ("video_grid_thw", videos)):
        if name in wanted and rows.any():
            found[name] = torch.tensor([GRID] * (int(rows.sum()) // visual_tokens(model.config.model_type)))
    if videos.any() and model.config.model_type == "ernie4_5_vl_moe":
        found["video_grid_thw"][:, 0] *= 2  # it merges frames two by two
    for name in ("video_second_per_grid", "second_per_grid_ts"):
        if name in wanted and videos.any():
            found[name] = torch.full((len(found["video_grid_thw"]),), 0.5)
    return found


def pixels(layout: str, seed: int = 7) -> dict[str, torch.Tensor]:
    """Three images, one for the first sample and two for the second, in one of the layouts that processors make."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    patches = 3 * GRID[1] * GRID[2]
    if layout == "images":
        return {"pixel_values": noise(3, 3, 24, 24)}
    if layout == "images and sizes":
        return {"pixel_values": noise(3, 3, 24, 24), "image_sizes": torch.tensor([[24, 24]] * 3)}
    if layout == "tiles":
        return {"pixel_values": noise(3, 1, 3, 24, 24)}
    if layout == "images by sample":
        values = noise(2, 2, 3, 24, 24)
        values[0, 1] = 0  # no second image
        return {"pixel_values": values, "pixel_attention_mask": torch.ones(2, 2, 24, 24, dtype=torch.bool)}
    _, height, width = GRID
    padded = height * width + 12  # the last are no patches
    if layout == "padded patches":
        mask = torch.arange(padded) < height * width
        return {
            "pixel_values": noise(3, padded, 3 * 4 * 4),
            "spatial_shapes": torch.tensor([[height, width]] * 3),
            "pixel_attention_mask": mask.long().expand(3, -1).contiguous(),
        }
    if layout == "patches with positions":
        places = torch.full((3, padded, 2), -1)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places[:, : height * width] = torch.stack([columns, rows], dim=-1).flatten(0, 1)
        return {"pixel_values": noise(3, padded, 3 * 4 * 4), "image_position_ids": places}
    grid = {"image_grid_thw": torch.tensor([GRID] * 3)}
    if layout == "patches of two frames":
        return {"pixel_values": noise(patches, 3 * 2 * 4 * 4), **grid}
    if layout == "patches":
        return {"pixel_values": noise(patches, 3 * 4 * 4), **grid}
    if layout == "square patches":
        return {"pixel_values": noise(patches, 3, 4, 4), **grid}
    if layout == "patches and merge sizes":
        return {"pixel_values": noise(patches, 3 * 4 * 4), "image_merge_sizes": torch.tensor([2] * 3), **grid}
    raise ValueError(layout)


def prompt_with_pixels(model: PreTrainedModel, layout: str) -> dict[str, torch.Tensor]:
    """A prompt whose placeholders are filled by the model's own vision tower."""
    images = pixels(layout)
    with torch.no_grad():
        output = core_of(model)[0].get_image_features(**images)
    features = getattr(output, "pooler_output", None)
    if features is None:
        features = getattr(output, "last_hidden_state", output)
    if isinstance(features, (tuple, list)) and not isinstance(features[0], torch.Tensor):
        features = features[0]  # transformers 4: with deepstack features behind
    if isinstance(features, (tuple, list)):
        features = torch.cat([each.flatten(0, -2) for each in features])
    return prompt(model, tokens=features.flatten(0, -2).shape[0] // 3) | images
