"""A call keeps the configuration that it started with: one ``generate()`` with all its steps, or one forward.

``generate()`` encodes images ahead of the forward that reads them, and goes on for many forwards; what it started with is a
context variable, so generations in other threads have their own. A forward by itself carries its configuration in its
`ForwardState`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attachment import Attachment, attach_lock, attachment_of
from .config import GapConfig
from .state import HeadArguments
from .visual_prompt import VisualPrompt


@dataclass(frozen=True, eq=False)
class Generation:
    """A running ``generate()``.

    Attributes:
        model: The model that generates.
        configs: What was attached to it at the start, each with its configuration; None for what was being detached.
        inside: It runs inside of another one, as that of an assistant does.
        sizes: What `gap_triton.prepare` has read of the sizes of its images, by argument; None where it was not called.
    """

    model: nn.Module
    configs: dict[Attachment, GapConfig | None]
    inside: bool
    sizes: dict[str, Any] | None


_generation: ContextVar[Generation | None] = ContextVar("gap_triton_generation", default=None)


@contextmanager
def generation_of(model: nn.Module, prepared: Any = None) -> Iterator[None]:
    """Keep configuration and hooks of a ``generate()`` of ``model`` until it ends.

    Args:
        model: The model.
        prepared: Its argument ``visual_prompt``. It encodes images ahead of the forward that is given that.
    """
    attached = attachment_of(model)
    attachments = (
        [attached] if attached is not None else list(filter(None, map(attachment_of, model.modules())))
    )
    configs = {each: None if each.closing else each.config for each in attachments}
    sizes = prepared.sizes if isinstance(prepared, VisualPrompt) else None
    generation = Generation(model, configs, _generation.get() is not None, sizes)
    token = _generation.set(generation)
    for attachment in attachments:
        attachment.running[generation] = None
        if attachment.closing:
            with attach_lock:  # a removal that began before this call was seen comes to its end first
                configs[attachment] = configs[attachment] if attachment.handles else None
    try:
        yield
    finally:
        _generation.reset(token)
        for attachment in configs:
            attachment.running.pop(generation, None)
            attachment.settle()


def is_assistant() -> bool:
    """Return whether what runs in this thread is an assistant, which writes drafts for another model's ``generate()``."""
    generation = _generation.get()
    return generation is not None and generation.inside


def current_sizes(attachment: Attachment) -> dict[str, Any] | None:
    """Return what the host knows of the sizes of images of the ``generate()`` that runs in this thread; None = nothing."""
    generation = None if torch.compiler.is_compiling() else _generation.get()
    return generation.sizes if generation is not None and attachment in generation.configs else None


def current_config(attachment: Attachment, head: HeadArguments | None = None) -> GapConfig | None:
    """Return the configuration of the call that runs in this thread; None if it prunes nothing.

    Args:
        attachment: What is attached to the model that runs.
        head: What its head handed on in this forward, None if it is not known.
    """
    # What was compiled can't ask for a context variable: it reads the configuration when it is called.
    generation = None if torch.compiler.is_compiling() else _generation.get()
    if generation is not None:
        if attachment in generation.configs:
            return generation.configs[attachment]
        if any(module is attachment.owner for module in generation.model.modules()):
            return None  # attached since: what was encoded before was not recorded
    if attachment.closing:
        return None
    return attachment.config if head is None or head.config is None else head.config
