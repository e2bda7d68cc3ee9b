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
        owner: The module that receives ``input_ids`` and whose config names the image token.
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
    """Whether the config has a vision part next to a text part."""
    return getattr(model.config, "vision_config", None) is not None and model.can_generate()


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
    raise ValueError(
        f"gap_triton found no vision-language decoder in {type(model).__name__} (model_type={model_type!r}): expected a "
        f"module with a decoder stack in .{' or .'.join(TEXT_MODEL_NAMES)}. {instead}"
    )


def sliding_window(config: Any, index: int) -> int | None:
    """Sliding window of decoder layer ``index`` in tokens, None where it attends to everything."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding" not in layer_types[index]:
        return None
    return int(window)


def check_layer(layer: int, layers: int) -> None:
    """Raise ValueError unless at least one of the decoder's ``layers`` layers follows the pruning layer."""
    if layer > layers - 2:
        raise ValueError(
            f"GapConfig.layer={layer}: this model's decoder has {layers} layers; expected -1 to {layers - 2}, so that at "
            "least one layer follows the pruning layer"
        )
