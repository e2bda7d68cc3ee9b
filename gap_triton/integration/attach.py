"""Switching pruning on and off for one model: by name, or explicitly."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..arguments import OWN_ARGUMENTS, VISUAL_PROMPT
from ..attachment import ATTACHMENT_ATTRIBUTE, Attachment, attach_lock, attachment_of, recall_selection
from ..calls import generation_of
from ..config import GapConfig
from ..introspect import NAME, text_model_of
from ..prefill.answers import GENERATED
from ..prefill.position_ids import ID_RULES
from ..prefill.unrotated import refuse_unrotated
from ..selection import Selection
from ..vision.needs import hook_tower
from .decode_steps import head_step, owner_step, text_step
from .hooks import (
    Removal,
    after_head,
    after_owner,
    after_text,
    before_head,
    before_owner,
    before_text,
    hook_layers,
)
from .stages import check_stages, default_config
from .step_calls import put_short_way
from .supported_models import (
    Parts,
    check_heads,
    find_parts,
    is_vision_language_model,
    lone_decoder_of,
    refuse_own_attention,
    takes_kwargs,
    unwrap,
)
from .unpruned import warn_of_zeros


def attach(model: nn.Module, config: GapConfig | None = None) -> None:
    """Prune in ``model`` from now on, whatever attention implementation it was loaded with.

    The text model runs under ``"gap_triton"`` until `detach`, which restores the implementation that it had. One whose
    attention is more than that keeps its own, and can be pruned before its decoder only. On a model that is attached
    already this sets the configuration, and hooks those modules that were replaced since.

    Args:
        model: A vision-language model of transformers; or a decoder alone, such as `LlamaForCausalLM`. Of a
            decoder alone, forward and `generate` take ``visual_mask`` ([B, Q] bool), which rows are visual tokens, and,
            where the configuration needs it, ``visual_grid`` ([H, W], or a list of one per image), their rows and columns.
            Of any model they take ``visual_prompt``, from `gap_triton.prepare`.
            Either may be inside a wrapper: a PeftModel, what `torch.compile` returns, DataParallel.
        config: What to prune. None: ``GapConfig()``, or where tokens can't be dropped in the decoder,
            ``GapConfig(layer=-1, score="text_similarity")``, with a warning that says so.

    Raises:
        ValueError: The model can't be pruned, or not as ``config`` says.
        RuntimeError: Modules of the model were replaced, and a call that began before is still under way.
    """
    model = unwrap(model)
    parts = find_parts(model)
    config = _check_config(config if config is not None else default_config(parts), parts)
    with attach_lock:
        new = not _attachments_of(parts, model)
        attachment = _ensure_attached(model, parts, config)
        previous = parts.text.config._attn_implementation
        if previous == NAME or attachment.own_attention:
            return
        try:
            parts.text.set_attn_implementation(NAME)
        except ValueError:
            if new:
                attachment.close()
            raise
        attachment.restore = previous


def detach(model: nn.Module) -> None:
    """Take off everything that `attach`, or loading by name, put on ``model``.

    A model that was attached explicitly gets back the attention implementation that it had. One that was loaded by name
    keeps the name, which then means plain dense attention. Does nothing to a model that is not attached. Don't use a
    cache that was pruned before: nothing is left that could refuse it.

    Calls that are running, in other threads or around this one, end as they began; the hooks are taken off when the last of
    them ends. Calls that begin in between are dense.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={type(model).__name__}: expected a transformers PreTrainedModel")
    with attach_lock:
        for module in model.modules():
            _switched_away.pop(module, None)
        for attachment in _attachments_in(model):
            attachment.close()


def configure(model: nn.Module, config: GapConfig) -> None:
    """Set the configuration of a model that is attached or was loaded by name, for all threads that use it.

    Calls that are under way, a `generate` with all its steps, keep the configuration that they started with. Modules that
    were replaced since the model was attached get their hooks.

    Raises:
        ValueError: The model is not under ``"gap_triton"``, or can't be pruned as ``config`` says.
        RuntimeError: Modules of the model were replaced, and a call that began before is still under way.
    """
    model = unwrap(model)
    parts = find_parts(model)
    config = _check_config(config, parts)
    with attach_lock:
        if parts.text.config._attn_implementation != NAME and not any(
            attachment.own_attention for attachment in _attachments_of(parts, model)
        ):
            raise ValueError(
                f'{type(model).__name__} does not run under "{NAME}": load it with attn_implementation="{NAME}", call '
                f'model.set_attn_implementation("{NAME}"), or use gap_triton.attach(model, config)'
            )
        if all(attachment.closing for attachment in _attachments_of(parts, model)):
            raise ValueError(
                f'{type(model).__name__} runs under "{NAME}", but nothing is attached to it: use '
                "gap_triton.attach(model, config)"
            )
        _ensure_attached(model, parts, config)


@contextmanager
def pruning(model: nn.Module, config: GapConfig | None = None) -> Iterator[nn.Module]:
    """Prune inside the ``with`` block only; afterwards the model is what it was before.

    The block changes the model for everybody: threads that share one should configure it once instead.

    Args:
        model: A vision-language model, loaded with any attention implementation.
        config: What to prune, ``GapConfig()`` if None.

    Yields:
        ``model``.
    """
    before = _attachment_on(model)
    config_before = None if before is None else before.config
    attach(model, config)
    try:
        yield model
    finally:
        if config_before is None:
            detach(model)
        elif (attachment := _attachment_on(model)) is not None:
            with attach_lock:
                attachment.config = config_before
                hook_layers(attachment)


def is_attached(model: nn.Module) -> bool:
    """Return whether ``model``, or a part of it, runs under ``"gap_triton"``."""
    return any(not attachment.closing for attachment in _attachments_in(model))


def last_selection(model: nn.Module) -> Selection | None:
    """Return what the last pruned prefill of ``model`` in this thread kept; None if there was none."""
    attachment = _attachment_on(model)
    return None if attachment is None else recall_selection(attachment)


# --------------------------------------------------------------------------------------------- by name
# By decoder: the configuration that it had when it was given another name, and has again when it gets ours back.
_switched_away: weakref.WeakKeyDictionary[nn.Module, GapConfig] = weakref.WeakKeyDictionary()


def follow_attention_name() -> None:
    """Attach and detach whenever transformers gives a model, or takes from it, the name ``"gap_triton"``.

    There are two such moments, the end of a model's construction and `set_attn_implementation`. Both methods of
    `PreTrainedModel` are wrapped once, for all models; nothing is left on a model that runs under another name. If it gets
    the name back it has the configuration that it had, unless it was detached in between.
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
            with attach_lock:
                _synchronize(self)
        except (ValueError, RuntimeError):
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation = implementation
            raise
        return result

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    return wrapped


def let_generate_take_visual_mask() -> None:
    """Let `generate` of a model that is attached, and of no other, pass ``visual_mask`` and ``visual_grid`` on to forward.

    `generate` forwards unknown keyword arguments, but first refuses those that forward does not list.
    """
    validate = GenerationMixin._validate_model_kwargs
    if hasattr(validate, "_gap_follows"):
        return

    @functools.wraps(validate)
    def wrapped(self: Any, model_kwargs: dict[str, Any]) -> None:
        if is_attached(self):
            model_kwargs = {key: value for key, value in model_kwargs.items() if key not in OWN_ARGUMENTS}
        validate(self, model_kwargs)

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    GenerationMixin._validate_model_kwargs = wrapped


def let_calls_keep_their_configuration() -> None:
    """Let every `generate` keep the configuration that it starts with, see `gap_triton.calls`."""
    generate = GenerationMixin.generate
    if hasattr(generate, "_gap_follows"):
        return

    @functools.wraps(generate)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with generation_of(self, kwargs.get(VISUAL_PROMPT)):
            return generate(self, *args, **kwargs)

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    GenerationMixin.generate = wrapped


def refuse_continuous_batching() -> None:
    """Let models that are attached refuse continuous batching, which would switch to another attention without a warning."""
    name = "init_continuous_batching"  # every way into it goes through this one
    method = getattr(GenerationMixin, name, None)
    if method is None or hasattr(method, "_gap_follows"):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_attached(self):
            raise ValueError(
                f"{type(self).__name__}: continuous batching packs the tokens of several requests into one row, which "
                "gap_triton can't prune. Use generate(), or call gap_triton.detach(model) and "
                "model.set_attn_implementation('sdpa') first"
            )
        return method(self, *args, **kwargs)

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    setattr(GenerationMixin, name, wrapped)


def let_generate_count_generated_tokens() -> None:
    """Let `generate` of an attached model, where it runs without a KV cache, count the tokens that it has written.

    Its forwards get the prompt and those tokens as one input, in which nothing else separates them.
    """
    update = GenerationMixin._update_model_kwargs_for_generation
    if hasattr(update, "_gap_follows"):
        return

    @functools.wraps(update)
    def wrapped(
        self: Any,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        model_kwargs = update(self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens)
        if not model_kwargs.get("use_cache", True) and is_attached(self):
            model_kwargs[GENERATED] = model_kwargs.get(GENERATED, 0) + num_new_tokens
        return model_kwargs

    wrapped._gap_follows = True  # type: ignore[attr-defined]
    GenerationMixin._update_model_kwargs_for_generation = wrapped


def _synchronize(model: PreTrainedModel) -> None:
    for attachment in _attachments_in(model):
        if attachment.text.config._attn_implementation != NAME and not attachment.own_attention:
            if not attachment.closing:
                _switched_away[attachment.text] = attachment.config
            attachment.restore = None
            attachment.close()
    for module in model.modules():
        text = text_model_of(module)
        if text is not None and text.config._attn_implementation == NAME:
            _ensure_attached_by_name(model, module, text)
    # A decoder stack alone may become part of a vision-language model later.
    decoder = lone_decoder_of(model)
    if decoder is not None and decoder is not model and decoder.config._attn_implementation == NAME:
        _ensure_attached_by_name(model, model, decoder)
    if is_vision_language_model(model) and model.config.get_text_config()._attn_implementation == NAME:
        find_parts(model)  # refuses a model that can't be pruned


def _ensure_attached_by_name(model: PreTrainedModel, module: PreTrainedModel, text: PreTrainedModel) -> None:
    try:
        parts = find_parts(module)
    except ValueError:
        if attachment_of(text) is not None:
            return  # the decoder was attached alone, inside a model that can't be
        raise
    check_heads(model, parts)
    refuse_own_attention(model, parts)
    attachment = _ensure_attached(model, parts, None)
    attachment.restore = None  # the name was given by hand, so there is nothing to go back to


# --------------------------------------------------------------------------------------------- hooks
def _ensure_attached(model: nn.Module, parts: Parts, config: GapConfig | None) -> Attachment:
    """The attachment of ``parts``, made now if there is none, or if they were replaced; ``config`` None = as before."""
    earlier = _attachments_of(parts, model)
    attachment = next((each for each in earlier if _covers(each, parts)), None)
    replaced = [each for each in earlier if each is not attachment]
    if any(each.is_running() for each in replaced):
        raise RuntimeError(
            f"modules of {type(model).__name__} were replaced since gap_triton was attached, and a call that began before "
            "is still under way: attach again when it has ended"
        )
    config = (
        config or next((each.config for each in earlier if not each.closing), None) or _config_before(parts)
    )
    _switched_away.pop(parts.text, None)
    restore = next((each.restore for each in earlier if each.restore is not None), None)
    for each in replaced:
        each.restore = None
        each.close()
    if attachment is None:
        attachment = _install(parts, config)
    else:
        attachment.closing = False
        hook_tower(attachment, config)
        attachment.config = config
        hook_layers(attachment)
    attachment.restore = restore
    _follow_heads(attachment, model)
    return attachment


def _config_before(parts: Parts) -> GapConfig:
    """The configuration that the decoder of ``parts`` had under our name; the default, if it has had none.

    Raises:
        ValueError: The model can't be pruned so any more.
    """
    before = _switched_away.get(parts.text)
    return default_config(parts) if before is None else _check_config(before, parts)


def _install(parts: Parts, config: GapConfig) -> Attachment:
    owner, text = parts
    attachment = Attachment(config, owner, text)
    _register(attachment, "register_forward_pre_hook", owner, before_owner)
    _register(attachment, "register_forward_pre_hook", text, before_text)
    _register(attachment, "register_forward_hook", text, after_text, always_call=True)
    _register(attachment, "register_forward_hook", owner, after_owner, always_call=True)
    hook_layers(attachment)
    for module in (owner, text):
        object.__setattr__(module, ATTACHMENT_ATTRIBUTE, attachment)
    _let_steps_pass(attachment, owner, owner_step, attachment)
    if text is not owner:
        _let_steps_pass(attachment, text, text_step, attachment)
    try:
        hook_tower(attachment, config)
    except ValueError:
        attachment.close()
        raise
    return attachment


def _follow_heads(attachment: Attachment, model: nn.Module) -> None:
    """Hook the modules of ``model`` that hold the owner, which have the language head."""
    for head, name in _heads_of(attachment.owner, model):
        if any(head is known for known in attachment.heads):
            continue
        attachment.heads.append(head)
        warn_of_zeros(head)
        object.__setattr__(head, ATTACHMENT_ATTRIBUTE, attachment)
        _register(
            attachment,
            "register_forward_pre_hook",
            head,
            functools.partial(before_head, owner_name=name, takes_kwargs=takes_kwargs(head)),
        )
        removal = Removal()
        _register(attachment, "register_forward_hook", head, functools.partial(after_head, removal=removal))
        removal.handle = attachment.handles[-1]
        _let_steps_pass(attachment, head, head_step, attachment, name, takes_kwargs(head))


def _heads_of(owner: nn.Module, model: nn.Module) -> list[tuple[PreTrainedModel, str]]:
    return [
        (module, name)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for name, child in module.named_children()
        if child is owner
    ]


def _register(
    attachment: Attachment, method: str, module: Any, hook: Callable[..., Any], **options: Any
) -> None:
    hook = functools.partial(hook, attachment=attachment)
    attachment.handles.append(getattr(module, method)(hook, with_kwargs=True, **options))


def _let_steps_pass(attachment: Attachment, module: Any, step: Callable[..., Any], *arguments: Any) -> None:
    """Let decode steps of ``module`` run ``step`` in place of the hooks that it has got here."""
    hooks = (*module._forward_pre_hooks.items(), *module._forward_hooks.items())
    ours = frozenset(number for number, hook in hooks if _is_of(hook, attachment))
    attachment.handles.append(put_short_way(module, functools.partial(step, *arguments), ours))


def _is_of(hook: Any, attachment: Attachment) -> bool:
    return isinstance(hook, functools.partial) and hook.keywords.get("attachment") is attachment


def _attachments_in(model: nn.Module) -> list[Attachment]:
    return list(dict.fromkeys(filter(None, map(attachment_of, model.modules()))))


def _attachments_of(parts: Parts, model: nn.Module) -> list[Attachment]:
    """The attachments of ``parts`` and of modules around them, outermost first, outdated ones included."""
    modules = [*(head for head, _ in _heads_of(parts.owner, model)), *parts]
    return list(dict.fromkeys(filter(None, map(attachment_of, modules))))


def _attachment_on(model: nn.Module) -> Attachment | None:
    attachment = attachment_of(find_parts(model).text)
    return None if attachment is None or attachment.closing else attachment


def _covers(attachment: Attachment, parts: Parts) -> bool:
    """Whether the hooks are on these parts; those of a whole model cover the decoder inside it."""
    if attachment.text is not parts.text:
        return False
    inside = parts.owner is parts.text and text_model_of(attachment.owner) is parts.text
    return attachment.owner is parts.owner or inside


def _check_config(config: GapConfig, parts: Parts) -> GapConfig:
    if not isinstance(config, GapConfig):
        raise ValueError(f"config={config!r}: expected a gap_triton.GapConfig")
    check_stages(config, parts)
    ID_RULES[config.ids].refuse(parts.text)
    refuse_unrotated(config, parts.text)
    return config
