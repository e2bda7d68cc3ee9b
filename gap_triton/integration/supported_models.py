"""Finding the parts of a vision-language model that pruning needs, and refusing models that it can't serve.

There is one adapter for all models, and no list of the models that it takes. A model is taken if it has

- a stack of layers, ``language_model`` or ``text_model``, under a module that sees ``input_ids``, each of them handing
  unknown keyword arguments on, which is how the state of a forward gets to the layers.

Before such a decoder tokens can be dropped whatever its layers do, as long as their kind and their arguments are known: it
is handed the survivors alone (`gap_triton.integration.survivors_only`). In the decoder they can be dropped if its later
layers can run on fewer tokens unchanged:

- in every layer one attention module, which calls transformers' attention interface, and nothing else that mixes tokens
  or remembers them: full or sliding self-attention over the layer's own keys and values;
- layers whose arguments `gap_triton.later_layers.inputs` can shorten.

Whatever falls outside is refused, in a sentence that says why, and where tokens can be dropped instead.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel, cache_utils
from transformers.utils import logging

from .._requirements import newer_than_tested
from ..arguments import ALL_CACHE_NAMES
from ..config import BEFORE_THE_DECODER, GapConfig
from ..introspect import (
    RECURRENT,
    TEXT_MODEL_NAMES,
    TOKEN_ID_FIELDS,
    calls_interface,
    layer_type,
    text_model_of,
    visual_token_ids,
)
from .attention import MORE_THAN_DENSE

logger = logging.get_logger(__name__)

CROSS_ATTENTION_NAMES = ("cross_attn", "crossattention", "encoder_attn")
PLAIN = "plain dense attention under this name"

# What each kind of layer does besides attending to its own keys and values.
UNSAFE_LAYER_TYPES = {
    "chunked_attention": "attends in chunks of its own sequence, whose borders move when tokens are dropped",
    "linear_attention": "carries a recurrent state that every token has entered, so none can be taken out",
    "conv": "mixes neighbouring tokens by a convolution, and dropping makes others neighbours",
    "indexed_attention": "chooses by an index of its own which tokens it attends to",
    "minimax_m3_sparse": "chooses by an index of its own which blocks of tokens it attends to",
    "reference_sliding_attention": "slides over answers only, in a cache that counts the tokens of the prompt",
    "hybrid": "mixes neighbouring tokens by convolutions, and dropping makes others neighbours",
    "hybrid_sliding": "mixes neighbouring tokens by convolutions, and dropping makes others neighbours",
    "moe": "attends to nothing",
    "mlp": "attends to nothing",
}
HYBRID = ("hybrid", "hybrid_sliding")
# Releases before 5 keep recurrent states and convolutions in caches of their own, which don't tell what each layer holds.
STATES_IN_CACHE = hasattr(cache_utils, "LinearAttentionLayer")
PER_LAYER = "each layer is handed a share of every token's input besides the hidden states"
UNSAFE_PARAMETERS = {
    "shared_kv_states": "some layers may attend to keys and values of an earlier layer, which holds other tokens once some "
    "were dropped in between",
    "per_layer_inputs": PER_LAYER,
    "per_layer_input": PER_LAYER,
    "image_embeds": "it puts image features in by itself, and no placeholder token says where they are",
}
ATTACH_BEFORE = (
    "Under its own attention it can be pruned before its decoder: load it under that and call gap_triton.attach(model, "
    "GapConfig(layer=-1, score='text_similarity')). "
)
# Heads of transformers, by the end of their names, that read the last hidden state of every token.
READS_EVERY_ROW = ("ForRetrieval", "ForTokenClassification", "ForQuestionAnswering")
SAFE_LAYER_TYPES = ("full_attention", "sliding_attention")

# Arguments that a layer and its attention may take; each is shortened, rebuilt, or does not depend on the tokens.
LAYER_PARAMETERS = frozenset(
    {
        "self",
        "hidden_states",
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "position_embeddings_global",
        "position_embeddings_local",
        "moe_mm_token_type_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        *ALL_CACHE_NAMES,
    }
)
# Arguments of layers that run on the survivors alone, besides those; each is made from what the decoder was handed.
MORE_LAYER_PARAMETERS = frozenset(
    {
        "per_layer_input",
        "shared_kv_states",
        "prev_topk_indices",
        "relative_distance",
        "block_states",
        "conv_mask",
        "ple_input_ids",
        "input_ids",
        "cache_params",
    }
)
# Arguments that only a module takes that remembers tokens, or that looks at others.
REMEMBERS_TOKENS = frozenset({*ALL_CACHE_NAMES, "cache_params"})
SEES_TOKENS = REMEMBERS_TOKENS | {"attention_mask", "position_embeddings"}
DECODER_PARAMETERS = frozenset(
    {
        "self",
        "input_ids",
        "inputs_embeds",
        "pixel_values",
        "mm_encoder_outputs",
        "attention_mask",
        "position_ids",
        "cache_position",
        "moe_mm_token_type_ids",
        "visual_pos_masks",
        "deepstack_visual_embeds",
        "vision_mask",
        "deepstack_features",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        *ALL_CACHE_NAMES,
    }
)


# Arguments of decoders that are handed the survivors alone: those with one entry per token are shortened with them.
DECODER_PARAMETERS_BEFORE = (
    DECODER_PARAMETERS - {"visual_pos_masks", "deepstack_visual_embeds", "vision_mask", "deepstack_features"}
) | {"per_layer_inputs", "ple_input_ids", "logits_to_keep"}


class Parts(NamedTuple):
    """The two modules that carry hooks.

    Attributes:
        owner: The module that receives ``input_ids`` and whose config names the image token; ``text`` itself where the
            model is a decoder alone, whose visual tokens the caller names (`gap_triton.integration.visual_mask`).
        text: The decoder stack, with its layers in ``text.layers``.
    """

    owner: PreTrainedModel
    text: PreTrainedModel


def is_vision_language_model(model: PreTrainedModel) -> bool:
    """Return whether ``model`` generates text and reads images, by its config."""
    config = model.config
    sees = any(getattr(config, name, None) is not None for name in ("vision_config", "vq_config"))
    return model.can_generate() and (sees or bool(visual_token_ids(config)))


def lone_decoder_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the decoder stack of a text model, None for any other model."""
    text = model.base_model
    layers = text._modules.get("layers")
    if not isinstance(text, PreTrainedModel) or not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    return None if REMEMBERS_TOKENS.isdisjoint(_parameters(layers[0])) else text


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers that ``model`` is, or wraps.

    A wrapper may be a PeftModel, what `torch.compile` returns, DataParallel, or any module that holds one.

    Raises:
        ValueError: It holds none, or several.
    """
    models, inside = [], [model] if isinstance(model, nn.Module) else []
    while inside:
        module = inside.pop(0)
        if isinstance(module, PreTrainedModel):
            models.append(module)
        else:
            inside += [child for child in module.children() if child not in inside]
    if len(models) != 1:
        several = (
            f", and it holds several: {', '.join(type(each).__name__ for each in models)}" if models else ""
        )
        raise ValueError(
            f"model={type(model).__name__}: expected a transformers PreTrainedModel, or a wrapper around one{several}"
        )
    return models[0]


def find_parts(model: nn.Module) -> Parts:
    """Locate owner and decoder stack of ``model``, or of the model that it is wrapped around.

    Raises:
        ValueError: The model can't be pruned; the sentence says why and what to do instead.
    """
    model = unwrap(model)
    parts = next((Parts(m, text) for m in model.modules() if (text := text_model_of(m)) is not None), None)
    if parts is None and (decoder := lone_decoder_of(model)) is not None:
        parts = Parts(decoder, decoder)
    reason = _why_not(model, parts)
    if reason is not None:
        raise refusal(model, parts, reason)
    if parts is None:
        raise ValueError(
            f"gap_triton found no vision-language decoder in {description(model)}: expected a module with a decoder stack "
            f"in .{' or .'.join(TEXT_MODEL_NAMES)}, or a decoder alone. {_unpruned_hint()}"
        )
    return parts


def check_heads(model: PreTrainedModel, parts: Parts) -> None:
    """Raise ValueError if a head of ``model``, around its ``parts``, reads what pruning takes away."""
    reason = _reads_every_row(model, parts.owner)
    if reason is not None:
        raise refusal(model, parts, reason)


def refusal(
    model: PreTrainedModel, parts: Parts | None, reason: str, where: str = "", instead: str = ""
) -> ValueError:
    """Return the refusal of ``model``.

    Args:
        model: The model.
        parts: Its parts, None where it has none.
        reason: The end of a sentence.
        where: Behind the model's name, where it can't be pruned; empty where nowhere.
        instead: What can be done; empty where that is to be found out.
    """
    hint = instead or _decoder_hint(model, parts)
    hint += _unpruned_hint("eager" if PLAIN in reason else "sdpa")
    return ValueError(f"gap_triton can't prune {description(model)}{where}: {reason}. {hint}")


def refuse_own_attention(model: PreTrainedModel, parts: Parts) -> None:
    """Raise ValueError if ``model`` is to run under `NAME`, and its attention must keep its own implementation."""
    reason = why_own_attention(parts.text)
    if reason is not None:
        raise refusal(model, parts, reason, instead=ATTACH_BEFORE)


def description(model: PreTrainedModel) -> str:
    """Return the class and the type of ``model``, for sentences."""
    return f"{type(model).__name__} (model_type={getattr(model.config, 'model_type', None)!r})"


def _unpruned_hint(implementation: str = "sdpa") -> str:
    return f"Load it with attn_implementation={implementation!r} to run it unpruned{newer_than_tested('transformers')}."


def _decoder_hint(model: PreTrainedModel, parts: Parts | None) -> str:
    """How to prune the decoder of ``model`` alone, where only the modules around it are not supported; else empty."""
    if parts is None or parts.owner is parts.text or _second_decoder(model, parts.owner):
        return ""
    if _why_not(parts.text, Parts(parts.text, parts.text)):
        return ""
    owners_of_text = [
        name
        for name, module in model.named_modules()
        if name
        and isinstance(module, PreTrainedModel)
        and not any(child is parts.owner for child in module.modules())
        and any(child is parts.text for child in module.modules())
    ]
    return (
        f"Its decoder can be pruned by itself: gap_triton.attach(model.{owners_of_text[0]}, config), and hand visual_mask, "
        "a [B, Q] bool tensor that is True at visual tokens, to its forward or generate. "
    )


def _why_not(model: PreTrainedModel, parts: Parts | None) -> str | None:
    """The condition that ``model`` does not meet, as the end of a sentence; None if it meets all."""
    # A connector may have cross-attention of its own; what counts is the decoder.
    decoder = model if parts is None else parts.text
    last_names = {name.rsplit(".", 1)[-1] for name, _ in decoder.named_modules() if "qformer" not in name}
    if getattr(model.config, "is_encoder_decoder", False) or any(
        word in name for name in last_names for word in CROSS_ATTENTION_NAMES
    ):
        return "it reads the image through cross-attention, so its decoder holds no visual tokens to drop"
    if parts is None:
        return None
    owner, text = parts
    return (
        _second_decoder(model, owner)
        or _reads_every_row(model, owner)
        or _silent_modules(owner, text)
        or (_unsafe_before(text) if why_not_in_decoder(text) else None)
        or _no_token_id(owner, text)
    )


def why_not_in_decoder(text: PreTrainedModel) -> str | None:
    """Return why no token can be dropped between two layers of ``text``, as the end of a sentence; None if it can."""
    return (
        _unsafe_config(text)
        or unsafe_parameters(text.layers[0], LAYER_PARAMETERS)
        or unsafe_parameters(text, DECODER_PARAMETERS)
        or _unsafe_layers(text)
    )


def _unsafe_before(text: PreTrainedModel) -> str | None:
    """Why ``text`` can't even be handed the survivors alone."""
    for index in range(len(text.layers)):
        kind = layer_type(text.config, index)
        if kind in (*RECURRENT, *HYBRID) and not STATES_IN_CACHE:
            return f"decoder layer {index} is {kind!r}: this release of transformers keeps its state in a cache of its own"
        if kind not in SAFE_LAYER_TYPES and kind not in UNSAFE_LAYER_TYPES:
            return f"decoder layer {index} is {kind!r}: it is none of those known to be safe"
    for layer in map(_inner_module, text.layers):
        biased = [
            each for each in layer.modules() if calls_interface(each) and "position_bias" in _needs(each)
        ]
        if biased and "relative_distance" not in _parameters(layer):
            return f"{_more_than_dense(biased[0])}; it may count places in a cache and not position ids"
    known = LAYER_PARAMETERS | MORE_LAYER_PARAMETERS
    return _unknown_parameters(text.layers[0], known) or _unknown_parameters(text, DECODER_PARAMETERS_BEFORE)


def why_own_attention(text: PreTrainedModel) -> str | None:
    """Return why the attention of ``text`` must run under its own implementation, as the end of a sentence; None if not.

    Either it is more than plain dense attention, or it asks for the name of the implementation.
    """
    for layer in map(_inner_module, text.layers):
        for module in layer.modules():
            if not calls_interface(module):
                continue
            kind: Any = type(module)
            reason = _more_than_dense(module)
            if reason is None and _asks_for_name(kind):
                reason = f"{type(module).__name__} attends in another way under names that it knows"
            if reason is not None:
                return reason
    return None


@cache
def _asks_for_name(kind: Any) -> bool:
    """Whether the code of the class ``kind`` compares the name of its implementation of attention with others than "eager".

    In transformers 4.57 every attention asks for that one, and calls the interface under all others.
    """
    return any(
        _compares_name(each)
        for each in kind.__mro__
        if each.__module__.partition(".")[0] not in ("torch", "builtins")
    )


def _compares_name(kind: type) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, SyntaxError):
        return False
    comparisons = ((node.left, *node.comparators) for node in ast.walk(tree) if isinstance(node, ast.Compare))
    return any(any(map(_is_name, sides)) and not any(map(_is_eager, sides)) for sides in comparisons)


def _is_name(side: ast.expr) -> bool:
    return isinstance(side, ast.Attribute) and side.attr == "_attn_implementation"


def _is_eager(side: ast.expr) -> bool:
    return isinstance(side, ast.Constant) and side.value == "eager"


def _second_decoder(model: PreTrainedModel, owner: PreTrainedModel) -> str | None:
    inside = set(owner.modules())
    for name, module in model.named_modules():
        layers = module._modules.get("layers")
        if module in inside or not isinstance(layers, nn.ModuleList) or not len(layers):
            continue
        if not REMEMBERS_TOKENS.isdisjoint(_parameters(layers[0])):
            return f"a second decoder, {name} ({type(module).__name__}), reads what the first one holds of every token"
    return None


def _reads_every_row(model: PreTrainedModel, owner: PreTrainedModel) -> str | None:
    for head in model.modules():
        if type(head).__name__.endswith(READS_EVERY_ROW) and any(
            module is owner for module in head.modules()
        ):
            return (
                f"{type(head).__name__} makes an output of every token's last hidden state, and dropped tokens have none; "
                "prune in the model below it and read what survives"
            )
    return None


def _unsafe_config(text: PreTrainedModel) -> str | None:
    if getattr(text.config, "num_kv_shared_layers", None):
        return UNSAFE_PARAMETERS["shared_kv_states"]
    for index in range(len(text.layers)):
        kind = layer_type(text.config, index)
        if kind not in SAFE_LAYER_TYPES:
            what = UNSAFE_LAYER_TYPES.get(kind, "is none of those known to be safe")
            return f"decoder layer {index} is {kind!r}: it {what}"
    return None


def _silent_modules(owner: PreTrainedModel, text: PreTrainedModel) -> str | None:
    for module in (owner, text, text.layers[0]):
        if not takes_kwargs(module):
            return f"{type(module).__name__}.forward takes no further keyword arguments, so pruning can't reach its layers"
    return None


def _no_token_id(owner: PreTrainedModel, text: PreTrainedModel) -> str | None:
    if owner is text or visual_token_ids(owner.config):
        return None
    return f"model.config names no image token; expected one of {', '.join(TOKEN_ID_FIELDS)}"


def unsafe_parameters(module: nn.Module, known: frozenset[str]) -> str | None:
    """Return which argument of ``module`` is not ``known``, and what of it, as the end of a sentence; None if all are."""
    unknown = _unknown(module, known)
    for name in unknown:
        if name in UNSAFE_PARAMETERS:
            return f"{UNSAFE_PARAMETERS[name]} ({name!r} of {type(module).__name__}.forward)"
    return _unknown_parameters(module, known)


def _unknown(module: nn.Module, known: frozenset[str]) -> list[str]:
    return [n for n, p in _parameters(module).items() if n not in known and p.kind != p.VAR_KEYWORD]


def _unknown_parameters(module: nn.Module, known: frozenset[str]) -> str | None:
    unknown = _unknown(module, known)
    if "image_embeds" in unknown:
        return f"{UNSAFE_PARAMETERS['image_embeds']} ('image_embeds' of {type(module).__name__}.forward)"
    if unknown:
        names = ", ".join(map(repr, unknown))
        return f"{type(module).__name__}.forward takes {names}, which may belong to tokens that get dropped"
    return None


def _unsafe_layers(text: PreTrainedModel) -> str | None:
    reasons = (unsafe_attention(text, index, LAYER_PARAMETERS) for index in range(len(text.layers)))
    return next(filter(None, reasons), None)


def unsafe_attention(text: PreTrainedModel, index: int, known: frozenset[str]) -> str | None:
    """Return why decoder layer ``index`` is not plain attention to its own keys, as the end of a sentence; None if it is.

    Args:
        text: The decoder.
        index: The layer.
        known: Arguments that its attention may take.
    """
    layer = _inner_module(text.layers[index])
    attention = attention_at(text, index)
    if isinstance(attention, str):
        return attention
    inside = [m for m in layer.modules() if m is not layer]
    others = [m for m in inside if m is not attention and not SEES_TOKENS.isdisjoint(_parameters(m))]
    if others:
        return f"decoder layer {index} holds a {type(others[0]).__name__}, which looks at other tokens or remembers them"
    reason = _more_than_dense(attention) or unsafe_parameters(attention, known)
    if reason is not None:
        return reason
    mixing = next((m for m in layer.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.RNNBase))), None)
    if mixing is not None:
        return f"decoder layer {index} holds a {type(mixing).__name__}, which mixes neighbouring tokens"
    return None


def attention_at(text: PreTrainedModel, index: int) -> nn.Module | str:
    """Return the one attention module of decoder layer ``index``; else a sentence that says what was found."""
    layer = _inner_module(text.layers[index])
    inside = (m for m in layer.modules() if m is not layer)
    attentions = [m for m in inside if getattr(m, "layer_idx", None) == index and calls_interface(m)]
    if len(attentions) == 1:
        return attentions[0]
    names = ", ".join(type(m).__name__ for m in attentions) or "none"
    return (
        f"expected one attention module in decoder layer {index} that calls transformers' attention interface, "
        f"found {names}"
    )


def _more_than_dense(attention: nn.Module) -> str | None:
    """What ``attention`` needs besides dense attention, read from its code and its attributes."""
    for keyword in _needs(attention):
        return f"{type(attention).__name__} needs {MORE_THAN_DENSE[keyword]} ({keyword!r}), and attention is {PLAIN}"
    return None


def _needs(attention: nn.Module) -> list[str]:
    """The keywords of `MORE_THAN_DENSE` that ``attention`` hands to its implementation."""
    # Of `softcap=self.softcap` it depends on the attribute, which may be None; what a variable holds is not known.
    return [
        keyword
        for keyword, attribute in _keywords_given(inspect.unwrap(type(attention).forward))
        if attribute is None or getattr(attention, attribute, None) is not None
    ]


@cache
def _keywords_given(function: Any) -> tuple[tuple[str, str | None], ...]:
    """Which keywords of `MORE_THAN_DENSE` the calls in ``function`` name, each with the attribute of self that it gives."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return ()  # no source: the attention function itself refuses what it is given
    keywords: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.keyword) or node.arg not in MORE_THAN_DENSE:
            continue
        value = node.value
        if isinstance(value, ast.Constant) and value.value is None:
            continue
        attribute = None
        if (
            isinstance(value, ast.Attribute)
            and isinstance(value.value, ast.Name)
            and value.value.id == "self"
        ):
            attribute = value.attr
        keywords.append((node.arg, attribute))
    return tuple(keywords)


def takes_kwargs(module: nn.Module) -> bool:
    """Return whether the forward of ``module`` takes keyword arguments that it does not list."""
    return any(p.kind == p.VAR_KEYWORD for p in _parameters(module).values())


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(inspect.unwrap(type(_inner_module(module)).forward)).parameters)


def _inner_module(module: nn.Module) -> nn.Module:
    """``module``, or the module that it wraps and hands all arguments to, as what `torch.compile` returns."""
    while len(module._modules) == 1:
        parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())[1:]
        if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            break
        (module,) = module.children()
    return module


def check_layers(config: GapConfig, layers: int) -> None:
    """Raise ValueError unless at least one of the decoder's ``layers`` layers follows every pruning layer."""
    last = config.stages[-1].layer
    if last > layers - 2:
        allowed = f"-1 to {layers - 2}" if layers > 1 else f"{BEFORE_THE_DECODER}, before the decoder"
        count = f"{layers} layer{'' if layers == 1 else 's'}"
        raise ValueError(
            f"GapConfig.layer={last}: this model's decoder has {count}; expected {allowed}, so that at least one"
            f" layer follows the pruning layer (a preset is scaled to the decoder by layers={layers})"
        )
