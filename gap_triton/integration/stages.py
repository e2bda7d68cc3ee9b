"""Where in a model tokens can be dropped: at which of its decoder's layers, and before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import BEFORE_THE_DECODER, GapConfig, Score
from ..introspect import WITHOUT_ATTENTION, layer_type
from .supported_models import (
    DECODER_PARAMETERS,
    LAYER_PARAMETERS,
    SAFE_LAYER_TYPES,
    Parts,
    attention_at,
    check_layers,
    description,
    refusal,
    unsafe_attention,
    unsafe_parameters,
    why_not_in_decoder,
)

logger = logging.get_logger(__name__)

# Arguments of layers besides those that all have: inputs of each layer, and keys of earlier ones.
SHORTENED = frozenset({"per_layer_input", "shared_kv_states"})
HANDED_ON = frozenset({"per_layer_inputs", "logits_to_keep"})

BEFORE = (
    "Before its decoder it can: use GapConfig(layer=-1, score='text_similarity') or another score of layer=-1, as presets "
    "'text', 'trim', 'random' and 'spatial' do. "
)
SCORE: Score = "text_similarity"


def pruning_layers(text: PreTrainedModel) -> tuple[int, ...]:
    """Return the decoder layers of ``text`` at which tokens can be dropped for all that follow; empty where at none.

    Among layers that attend to nothing, such as recurrent ones, they are those with attention, which ranks. Where layers
    share keys and values, the one that makes them and those that use them must be on one side.
    """
    layers = range(len(text.layers) - 1)
    if why_not_in_decoder(text) is None:
        return tuple(layers)
    if getattr(text.config, "altup_num_inputs", None) or _unknown_layers(text):
        return ()
    attends = (index for index in layers if layer_type(text.config, index) in SAFE_LAYER_TYPES)
    return tuple(index for index in attends if not _shares_across(text, index))


def _unknown_layers(text: PreTrainedModel) -> bool:
    """Whether some layer can't be handed shorter inputs, or be followed by one that can."""
    if unsafe_parameters(text, DECODER_PARAMETERS | HANDED_ON):
        return True
    for index, layer in enumerate(text.layers):
        kind, known = layer_type(text.config, index), LAYER_PARAMETERS | SHORTENED
        if unsafe_parameters(layer, known):
            return True
        if kind in SAFE_LAYER_TYPES and unsafe_attention(text, index, known):
            return True
        if kind not in SAFE_LAYER_TYPES and kind not in WITHOUT_ATTENTION:
            return True
    return False


def _shares_across(text: PreTrainedModel, layer: int) -> bool:
    """Whether a layer behind ``layer`` attends to keys and values that one up to it has made."""
    attentions = {index: attention_at(text, index) for index in range(len(text.layers))}
    uses = [index for index, each in attentions.items() if getattr(each, "is_kv_shared_layer", False)]
    makes = [index for index, each in attentions.items() if getattr(each, "store_full_length_kv", False)]
    if not uses:
        return bool(getattr(text.config, "num_kv_shared_layers", None))  # said in a way that is not known
    return any(index > layer for index in uses) and any(index <= layer for index in makes)


def check_stages(config: GapConfig, parts: Parts) -> None:
    """Raise ValueError unless tokens can be dropped where ``config`` says, in the decoder of ``parts``."""
    check_layers(config, len(parts.text.layers))
    reason = why_not_in_decoder(parts.text)
    if reason is None:
        return
    in_decoder = [stage.layer for stage in config.stages if stage.layer != BEFORE_THE_DECODER]
    if in_decoder:
        allowed = pruning_layers(parts.text)
        if not allowed:
            raise refusal(parts.owner, parts, reason, " in its decoder", BEFORE)
        wrong = [layer for layer in in_decoder if layer not in allowed]
        if wrong:
            raise refusal(parts.owner, parts, reason, f" at decoder layer {wrong[0]}", _instead(allowed))
    if config.ids != "kept":
        raise ValueError(
            f"GapConfig.ids={config.ids!r}: renumbering is not defined for {type(parts.text).__name__} ({reason}); use "
            "ids='kept'"
        )


def _instead(allowed: tuple[int, ...]) -> str:
    return f"At layer {_listed(allowed)} it can. {BEFORE}"


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def default_config(parts: Parts) -> GapConfig:
    """Return the configuration of a model that was given none: the default, or the nearest to it that can be."""
    config, reason = GapConfig(), why_not_in_decoder(parts.text)
    if reason is None:
        return config
    allowed = pruning_layers(parts.text)
    if allowed:
        config = replace(config, layer=_nearest(config.layer, allowed))
        where = f"at decoder layer {config.layer}, by GapConfig(layer={config.layer})"
    else:
        config = GapConfig(layer=BEFORE_THE_DECODER, score=SCORE)
        where = f"before its decoder, by GapConfig(layer=-1, score={SCORE!r})"
    logger.warning_once(
        f"gap_triton drops visual tokens of {description(parts.owner)} {where}, because elsewhere it can't: {reason}."
    )
    return config


def _nearest(layer: int, allowed: tuple[int, ...]) -> int:
    """The first of ``allowed`` from ``layer`` on; where there is none, the last."""
    return next((each for each in allowed if each >= layer), allowed[-1])


def fitted(config: GapConfig, parts: Parts) -> GapConfig:
    """Return ``config`` with its stages in the decoder at the next layers that the decoder of ``parts`` can be pruned at.

    Raises:
        ValueError: It has not enough such layers, or can't be pruned where ``config`` says.
    """
    reason = why_not_in_decoder(parts.text)
    if reason is not None:
        allowed, layers = pruning_layers(parts.text), [stage.layer for stage in config.stages]
        in_decoder = [layer for layer in layers if layer != BEFORE_THE_DECODER]
        moved: list[int] = []
        for layer in in_decoder:
            behind = [each for each in allowed if each >= layer and (not moved or each > moved[-1])]
            if allowed and not behind:
                where = f" at layers from {_listed(in_decoder)} on"
                raise refusal(parts.owner, parts, reason, where, _instead(allowed))
            moved.append(behind[0] if behind else layer)
        if moved != in_decoder:
            first, *later = [*layers[: len(layers) - len(moved)], *moved]
            then = tuple(replace(stage, layer=layer) for stage, layer in zip(config.then, later, strict=True))
            config = replace(config, layer=first, then=then)
            logger.warning_once(
                f"gap_triton moves the stages of {description(parts.owner)} from decoder layers {_listed(in_decoder)} to "
                f"{_listed(moved)}, at which it can be pruned."
            )
    check_stages(config, parts)
    return config
