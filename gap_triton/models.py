"""Finding the parts of a vision-language model that pruning needs, and refusing models that it can't serve."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .prompt import TOKEN_ID_FIELDS, visual_token_ids

# Checked against the oracle (dropping equals masking) in the tests. A model type is added here together with its test.
SUPPORTED_MODELS = ("llava", "llava_next", "llava_onevision")
SUPPORTED_TEXT_MODELS = ("llama", "mistral", "qwen2")

TEXT_MODEL_NAMES = ("language_model", "text_model")
CROSS_ATTENTION_NAMES = ("cross_attn", "crossattention", "encoder_attn")


class Parts(NamedTuple):
    """The two modules that carry hooks.

    Attributes:
        owner: The module that receives ``input_ids`` and whose config names the image token; ``text`` itself where the
            model is a decoder alone, whose visual tokens the caller names (`gap_triton.visual_mask`).
        text: The decoder stack, with its layers in ``text.layers``.
    """

    owner: PreTrainedModel
    text: PreTrainedModel


def text_model_of(module: nn.Module) -> PreTrainedModel | None:
    """The decoder stack directly below ``module``, None where ``module`` is not the core of a VLM."""
    if not isinstance(module, PreTrainedModel):
        return None
    for name in TEXT_MODEL_NAMES:
        child = module._modules.get(name)
        if isinstance(child, PreTrainedModel) and isinstance(getattr(child, "layers", None), nn.ModuleList):
            return child
    return None


def is_vision_language_model(model: PreTrainedModel) -> bool:
    """Whether ``model`` generates text and reads images, as far as its config tells."""
    config = model.config
    sees = any(getattr(config, name, None) is not None for name in ("vision_config", "vq_config"))
    return model.can_generate() and (sees or bool(visual_token_ids(config)))


def lone_decoder_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The decoder stack of a text model of a supported type, None for any other model."""
    text = model.base_model
    is_decoder = isinstance(text, PreTrainedModel) and isinstance(
        getattr(text, "layers", None), nn.ModuleList
    )
    return text if is_decoder and text.config.model_type in SUPPORTED_TEXT_MODELS else None


def find_parts(model: nn.Module) -> Parts:
    """Locate owner and decoder stack of ``model``.

    Raises:
        ValueError: The model can't be pruned; the sentence says why and what to do instead.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model={type(model).__name__}: expected a transformers PreTrainedModel")
    model_type = getattr(model.config, "model_type", None)
    instead = "Load it with attn_implementation='sdpa' to run it unpruned."
    if any(
        word in name.rsplit(".", 1)[-1] for name, _ in model.named_modules() for word in CROSS_ATTENTION_NAMES
    ):
        raise ValueError(
            f"gap_triton can't prune {type(model).__name__} (model_type={model_type!r}): it reads the image through "
            f"cross-attention, so its decoder holds no visual tokens to drop. {instead}"
        )
    for owner in model.modules():
        text = text_model_of(owner)
        if text is None:
            continue
        assert isinstance(owner, PreTrainedModel)
        owner_type, text_type = owner.config.model_type, text.config.model_type
        if owner_type not in SUPPORTED_MODELS or text_type not in SUPPORTED_TEXT_MODELS:
            raise ValueError(
                f"gap_triton is not checked on model_type={owner_type!r} with a {text_type!r} decoder. Supported are "
                f"{', '.join(SUPPORTED_MODELS)} with one of {', '.join(SUPPORTED_TEXT_MODELS)}. {instead}"
            )
        if not visual_token_ids(owner.config):
            raise ValueError(
                f"model.config of {type(model).__name__} names no image token; expected one of {', '.join(TOKEN_ID_FIELDS)}"
            )
        return Parts(owner, text)
    decoder = lone_decoder_of(model)
    if decoder is not None:
        return Parts(decoder, decoder)
    raise ValueError(
        f"gap_triton found no vision-language decoder in {type(model).__name__} (model_type={model_type!r}): expected a "
        f"module with a decoder stack in .{' or .'.join(TEXT_MODEL_NAMES)}, or a decoder alone of type "
        f"{', '.join(SUPPORTED_TEXT_MODELS)}. {instead}"
    )


def layer_type(config: Any, index: int) -> str:
    """Attention type of decoder layer ``index``: ``"full_attention"`` or ``"sliding_attention"``."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return layer_types[index]
    slides = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    return "sliding_attention" if slides else "full_attention"


def sliding_window(config: Any, index: int) -> int | None:
    """Sliding window of decoder layer ``index`` in tokens, None where it attends to everything."""
    return int(config.sliding_window) if layer_type(config, index) == "sliding_attention" else None


def check_layer(layer: int, layers: int) -> None:
    """Raise ValueError unless at least one of the decoder's ``layers`` layers follows the pruning layer."""
    if layer > layers - 2:
        raise ValueError(
            f"GapConfig.layer={layer}: this model's decoder has {layers} layers; expected -1 to {layers - 2}, so that at "
            "least one layer follows the pruning layer"
        )
