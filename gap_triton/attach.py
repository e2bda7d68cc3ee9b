"""Switching pruning on and off for one model: by name, or explicitly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .attention import NAME
from .config import GapConfig
from .hooks import after_owner, after_text, before_head, before_layer, before_owner, before_text
from .models import (
    Parts,
    check_layers,
    find_parts,
    is_vision_language_model,
    lone_decoder_of,
    text_model_of,
)
from .selection import Selection
from .state import Attachment, recall_selection
from .vision.watch import let_tower_tell
from .visual_grid import VISUAL_GRID
from .visual_mask import VISUAL_MASK

OURS = (VISUAL_MASK, VISUAL_GRID)  # arguments of forward() and generate() that attached models take
ATTACHMENT_ATTRIBUTE = "_gap_attachment"


def attach(model: PreTrainedModel, config: GapConfig | None = None) -> None:
    """Prune in ``model`` from now on, whatever attention implementation it was loaded with.

    The text model runs under ``"gap_triton"`` until `detach`, which restores the implementation that it had. On a
    model that is attached already this sets the configuration.

    Args:
        model: A vision-language model of transformers; or a decoder alone, such as `LlamaForCausalLM`, which is told by
            ``visual_mask`` ([B, Q] bool, an argument of its forward and of `generate`) which rows are visual tokens, and by
            ``visual_grid`` ([H, W], or a list of one per image) how many rows and columns they make, where that is asked.
        config: What to prune, ``GapConfig()`` if None.

    Raises:
        ValueError: The model can't be pruned, or ``config.layer`` is outside its decoder.
    """
    parts = find_parts(model)
    config = _checked(config if config is not None else GapConfig(), parts)
    attachment = _attachment_of(parts.text)
    if attachment is not None and _covers(attachment, parts):
        _set(attachment, config)
        _follow_head(attachment, model)
        return
    if attachment is not None:
        restore = attachment.restore
        _remove(attachment)
        attachment = _install(parts, config)
        attachment.restore = restore
        _follow_head(attachment, model)
        return
    attachment = _install(parts, config)
    _follow_head(attachment, model)
    previous = parts.text.config._attn_implementation
    if previous != NAME:
        parts.text.set_attn_implementation(NAME)
        attachment.restore = previous


def detach(model: PreTrainedModel) -> None:
    """Take off everything that `attach`, or loading by name, put on ``model``.

    A model that was attached explicitly gets the attention implementation back that it had; one that was loaded by
    name keeps the name, which then means plain dense attention. Does nothing to a model that is not attached. A cache
    that was pruned before can't go on afterwards, and nothing is left that could say so.
    """
    for module in model.modules():
        attachment = _attachment_of(module)
        if attachment is None:
            continue
        _remove(attachment)
        if attachment.restore is not None:
            attachment.text.set_attn_implementation(attachment.restore)


def configure(model: PreTrainedModel, config: GapConfig) -> None:
    """Set the configuration of a model that is attached or was loaded by name, for all threads that use it.

    Raises:
        ValueError: The model is not under ``"gap_triton"``, or ``config.layer`` is outside its decoder.
    """
    parts = find_parts(model)
    attachment = _attachment_of(parts.text)
    if attachment is None:
        raise ValueError(
            f'{type(model).__name__} does not run under "{NAME}": load it with attn_implementation="{NAME}", call '
            f'model.set_attn_implementation("{NAME}"), or use gap_triton.attach(model, config)'
        )
    _set(attachment, _checked(config, parts))


@contextmanager
def pruning(model: PreTrainedModel, config: GapConfig | None = None) -> Iterator[PreTrainedModel]:
    """Prune inside the ``with`` block only; afterwards the model is what it was before.

    The block changes the model for everybody: threads that share one should configure it once instead.

    Args:
        model: A vision-language model, loaded with any attention implementation.
        config: What to prune, ``GapConfig()`` if None.

    Yields:
        ``model``.
    """
    before = _attachment_of(find_parts(model).text)
    config_before = None if before is None else before.config
    attach(model, config)
    try:
        yield model
    finally:
        if before is None:
            detach(model)
        else:
            assert config_before is not None
            before.config = config_before


def is_attached(model: nn.Module) -> bool:
    """Whether ``model``, or a part of it, runs under ``"gap_triton"``."""
    return any(_attachment_of(module) is not None for module in model.modules())


def last_selection(model: PreTrainedModel) -> Selection | None:
    """What the last pruned prefill of ``model`` in this thread kept; None if there was none."""
    attachment = _attachment_of(find_parts(model).text)
    return None if attachment is None else recall_selection(attachment)


# --------------------------------------------------------------------------------------------- by name
def follow_attention_name() -> None:
    """Attach and detach whenever transformers gives a model, or takes from it, the name ``"gap_triton"``.

    There are two such moments, the end of a model's construction and `set_attn_implementation`. Both methods of
    `PreTrainedModel` are wrapped once, for all models; nothing is left on a model that runs under another name.
    """
    for name in ("post_init", "set_attn_implementation"):
        method = getattr(PreTrainedModel, name)
        if not hasattr(method, "_gap_follows"):
            setattr(PreTrainedModel, name, _then_synchronize(method))


def _then_synchronize(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # Parents come before their children, and setting a parent's implementation sets its children's.
        configs = [module.config for module in self.modules() if isinstance(module, PreTrainedModel)]
        before = [config._attn_implementation for config in configs]
        result = method(self, *args, **kwargs)
        try:
            _synchronize(self)
        except ValueError:
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation = implementation
            raise
        return result

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    return wrapped


def let_generate_take_visual_mask() -> None:
    """Let `generate` of a model that is attached, and of no other, pass ``visual_mask`` and ``visual_grid`` on to forward.

    `generate` forwards keyword arguments that it does not know, but first refuses those that forward does not list.
    """
    validate = GenerationMixin._validate_model_kwargs
    if hasattr(validate, "_gap_follows"):
        return

    @functools.wraps(validate)
    def wrapped(self: Any, model_kwargs: dict[str, Any]) -> None:
        if is_attached(self):
            model_kwargs = {key: value for key, value in model_kwargs.items() if key not in OURS}
        validate(self, model_kwargs)

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    GenerationMixin._validate_model_kwargs = wrapped


def _synchronize(model: PreTrainedModel) -> None:
    for module in model.modules():
        attachment = _attachment_of(module)
        if attachment is not None:
            if attachment.text.config._attn_implementation != NAME:
                _remove(attachment)
            else:
                attachment.restore = None  # the name was given by hand, so there is nothing to go back to
                _follow_head(attachment, model)
            continue
        text = text_model_of(module)
        if text is not None and text.config._attn_implementation == NAME and _attachment_of(text) is None:
            _follow_head(_install(find_parts(module), GapConfig()), model)
    # Of a decoder stack alone nobody knows yet whether it will be part of a vision-language model.
    decoder = lone_decoder_of(model) if model.can_generate() else None
    if (
        decoder is not None
        and decoder.config._attn_implementation == NAME
        and _attachment_of(decoder) is None
    ):
        _follow_head(_install(find_parts(model), GapConfig()), model)
    if is_vision_language_model(model) and model.config.get_text_config()._attn_implementation == NAME:
        find_parts(model)  # a model that can't be pruned says so now


# --------------------------------------------------------------------------------------------- hooks
def _install(parts: Parts, config: GapConfig) -> Attachment:
    owner, text = parts
    attachment = Attachment(config, owner, text)
    register_pre = functools.partial(_register, attachment, "register_forward_pre_hook")
    register_pre(owner, functools.partial(before_owner, attachment=attachment))
    register_pre(text, before_text)
    for index, layer in enumerate(text.layers):
        register_pre(layer, functools.partial(before_layer, index=index))
    _register(attachment, "register_forward_hook", text, after_text)
    _register(attachment, "register_forward_hook", owner, after_owner)
    object.__setattr__(text, ATTACHMENT_ATTRIBUTE, attachment)
    try:
        let_tower_tell(attachment, config)
    except ValueError:
        _remove(attachment)
        raise
    return attachment


def _follow_head(attachment: Attachment, model: PreTrainedModel) -> None:
    """Hook ``model`` too where it is the module around the owner, with the language head."""
    if attachment.head is None and any(child is attachment.owner for child in model.children()):
        attachment.head = model
        _register(
            attachment,
            "register_forward_pre_hook",
            model,
            functools.partial(before_head, attachment=attachment),
        )


def _register(attachment: Attachment, method: str, module: Any, hook: Callable[..., Any]) -> None:
    attachment.handles.append(getattr(module, method)(hook, with_kwargs=True))


def _remove(attachment: Attachment) -> None:
    for handle in reversed(attachment.handles):
        handle.remove()
    object.__delattr__(attachment.text, ATTACHMENT_ATTRIBUTE)


def _set(attachment: Attachment, config: GapConfig) -> None:
    let_tower_tell(attachment, config)
    attachment.config = config


def _attachment_of(module: Any) -> Attachment | None:
    return module.__dict__.get(ATTACHMENT_ATTRIBUTE)


def _covers(attachment: Attachment, parts: Parts) -> bool:
    """False if the decoder was attached alone, and is now to be attached as part of a vision-language model."""
    return attachment.owner is not attachment.text or parts.owner is parts.text


def _checked(config: GapConfig, parts: Parts) -> GapConfig:
    if not isinstance(config, GapConfig):
        raise ValueError(f"config={config!r}: expected a gap_triton.GapConfig")
    check_layers(config, len(parts.text.layers))
    return config
