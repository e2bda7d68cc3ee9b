"""The variants that are compared: one model without pruning, attached, pruned, and the oracle, on shared weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from .. import GapConfig, attach, static_cache
from ..arguments import CACHE
from ..introspect import text_model_of
from ..kv_cache.kept_tokens import kept_tokens_of
from .oracle import Oracle, Survivors
from .subjects import Subject

UNPRUNED, ATTACHED, PRUNED, ORACLE = "sdpa", "attached", "pruned", "oracle"


def graphed(name: str) -> str:
    """The name of a variant whose prefill and steps are replays of CUDA graphs."""
    return f"{name} graph"


def share(model: Any) -> Any:
    """Copy a model's modules, not its parameters and buffers."""
    return copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})


@dataclass
class Variant:
    """One way to run the model.

    Attributes:
        name: ``"sdpa"``, ``"attached"``, ``"pruned"``, ``"oracle"``, or what else is measured beside them.
        model: Modules of its own on shared weights.
        inputs: Of its prefill.
        next_ids: [B, 1] or [A, B, 1] int64, position ids of the first token that is generated.
        make_cache: Makes an empty KV cache.
        prefilling: What lasts as long as its prefill.
        step: Runs a decode step: the model, or that under ``torch.compile``.
        holds_memory: It holds what a prefill needs for as long as it lasts, so that a prefill allocates little.
    """

    holds_memory: ClassVar[bool] = False

    name: str
    model: Any
    inputs: dict[str, Tensor]
    next_ids: Tensor
    make_cache: Callable[[], Any]
    prefilling: Callable[[], AbstractContextManager[Any]] = nullcontext
    step: Callable[..., Any] | None = None
    generated: int = field(default=0, init=False)
    cache: Any = field(default=None, init=False)
    token: Tensor = field(init=False)

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Read the prompt into an empty cache; returns the logits of its last token [B, vocabulary]."""
        self.cache = None  # the memory of the one before is free again
        self.cache = self.make_cache()
        with self.prefilling():
            output = self.model(**self.inputs, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1)
        self.generated = 0
        logits: Tensor = output.logits[:, -1]
        self.token = logits.argmax(-1, keepdim=True)
        return logits

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Generate one more token, greedily; returns its logits [B, vocabulary]."""
        run = self.model if self.step is None else self.step
        output = run(
            input_ids=self.token,
            position_ids=self.next_ids + self.generated,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self.cache},
        )
        self.generated += 1
        logits: Tensor = output.logits[:, -1]
        self.token = logits.argmax(-1, keepdim=True)
        return logits

    def kv_bytes(self) -> int:
        """Bytes of keys and values in the cache, as allocated."""
        return bytes_of_cache(self.cache)


def bytes_of_cache(cache: Any) -> int:
    """Bytes of keys and values in a KV cache, as allocated."""
    tensors = (each for layer in cache.layers for each in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _first_position_ids(text: Any) -> Iterator[list[Any]]:
    """The position ids that the decoder gets while this lasts."""
    found: list[Any] = []
    handle = text.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs.get("position_ids")), with_kwargs=True
    )
    try:
        yield found
    finally:
        handle.remove()


def decoder_of(model: Any) -> Any:
    """The decoder in a model."""
    for module in model.modules():
        found = text_model_of(module)
        if found is not None:
            return found
    raise ValueError(f"{type(model).__name__} has no decoder that is known here")


def _ids_behind_the_prompt(subject: Subject) -> Tensor:
    """Position ids of the token that follows the prompt [B, 1] or [A, B, 1]: the greatest of any axis, plus one."""
    with torch.no_grad(), _first_position_ids(decoder_of(subject.model)) as found:
        subject.model(**subject.inputs, logits_to_keep=1)
    ids = found[0]
    if ids is None:
        return torch.full((subject.batch, 1), subject.prompt_tokens, device=subject.device)
    axes = ids[-3:] if ids.dim() == 3 else ids
    following = axes.amax(dim=(0, -1) if ids.dim() == 3 else -1)[..., None] + 1
    following = following.expand(subject.batch, 1)
    return following.expand(3, -1, -1) if ids.dim() == 3 else following


def variants_of(
    subject: Subject, config: GapConfig, *, steps: int, static: bool = False, compile_steps: bool = False
) -> list[Variant]:
    """Make the variants of a model, the oracle last.

    Args:
        subject: The model and its inputs.
        config: What to prune.
        steps: How many tokens will be generated behind the prompt, at most.
        static: Whether to use static KV caches; `gap_triton.static_cache` for the pruned one.
        compile_steps: Whether to run decode steps under ``torch.compile``.

    Raises:
        ValueError: The model can't be pruned so, ``config`` drops nothing of these inputs, or no oracle can be made.
    """
    next_ids = _ids_behind_the_prompt(subject)
    length = subject.prompt_tokens + steps
    models = {UNPRUNED: share(subject.model)}
    for name, each in ((ATTACHED, GapConfig(1.0, config.layer, config.score)), (PRUNED, config)):
        models[name] = share(subject.model)
        attach(models[name], each)

    def plain_cache(model: Any) -> Any:
        text = decoder_of(model).config
        return StaticCache(config=text, max_cache_len=length) if static else DynamicCache(config=text)

    def pruned_cache(model: Any) -> Any:
        return static_cache(model, length) if static else plain_cache(model)

    makers = {UNPRUNED: plain_cache, ATTACHED: plain_cache, PRUNED: pruned_cache}
    made = [
        Variant(name, model, subject.inputs, next_ids, lambda model=model, make=makers[name]: make(model))  # type: ignore[misc]
        for name, model in models.items()
    ]
    model = share(subject.model)
    oracle = Oracle(model, decoder_of(model), _survivors(made[-1], config), subject.prompt_tokens)
    make = functools.partial(oracle.static_cache, length) if static else oracle.dynamic_cache
    made.append(Variant(ORACLE, model, subject.inputs, next_ids, make, oracle.shortened))
    if compile_steps:
        mode = "reduce-overhead" if subject.device.type == "cuda" else None
        made = [replace(each, step=torch.compile(each.model, mode=mode)) for each in made]
    return made


def _survivors(pruned: Variant, config: GapConfig) -> list[Survivors]:
    """Prune once, and see what survives: the rows, and the hidden states where tokens are merged."""
    entered: dict[int, Tensor] = {}
    layers = decoder_of(pruned.model).layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, index=index: entered.update({index: args[0]}))
        for index, layer in enumerate(layers)
    ]
    try:
        pruned.prefill()
    finally:
        for hook in hooks:
            hook.remove()
    kept = kept_tokens_of(pruned.cache, pruned.token.shape[0])
    if kept is None:
        raise ValueError(f"keep={config.keep!r} drops nothing of this prompt, so there is nothing to compare")
    found = []
    for stage in kept.stages:
        rows = stage.index[0]
        if not stage.dense or not bool((stage.index == rows).all()):
            # An oracle for each sample would be another model; the same image in every sample is as good a load.
            raise ValueError(
                "samples keep different rows, and the oracle handles one choice: use the same image in each"
            )
        merged = stage.layer < 0 and config.merge != "none"
        found.append(
            Survivors(stage.first_later, rows, entered[stage.first_later].clone() if merged else None)
        )
    return found
