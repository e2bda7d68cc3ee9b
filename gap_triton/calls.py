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

from torch import nn

from .config import GapConfig
from .state import Attachment, Call, attachment_of


@dataclass(frozen=True, eq=False)
class Generation:
    """A running ``generate()``.

    Attributes:
        model: The model that generates.
        attachment: What was attached to it at the start, None if nothing was.
        config: The configuration at the start, None if nothing was to be pruned.
    """

    model: nn.Module
    attachment: Attachment | None
    config: GapConfig | None

    def concerns(self, attachment: Attachment) -> bool:
        """Whether ``attachment`` is on the model that generates; it may have been attached since."""
        return attachment is self.attachment or any(
            module is attachment.owner for module in self.model.modules()
        )


_generation_now: ContextVar[Generation | None] = ContextVar("gap_triton_generation", default=None)


@contextmanager
def generation_of(model: nn.Module) -> Iterator[None]:
    """A ``generate()`` of ``model``, which keeps its configuration and its hooks until it ends."""
    attachment = attachment_of(model) or next(filter(None, map(attachment_of, model.modules())), None)
    config = None if attachment is None or attachment.closing else attachment.config
    generation = Generation(model, attachment, config)
    token = _generation_now.set(generation)
    if attachment is not None:
        attachment.running.add(generation)
    try:
        yield
    finally:
        _generation_now.reset(token)
        if attachment is not None:
            attachment.running.discard(generation)
            attachment.close_if_idle()


def config_now(attachment: Attachment, call: Call | None = None) -> GapConfig | None:
    """The configuration of the call that runs in this thread; None if it prunes nothing.

    Args:
        attachment: What is attached to the model that runs.
        call: What its head told of this forward, None if it is not known.
    """
    generation = _generation_now.get()
    if generation is not None and generation.concerns(attachment):
        return generation.config
    if attachment.closing:
        return None
    return attachment.config if call is None or call.config is None else call.config
