"""What pruning stores on a model while it is attached."""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .config import GapConfig
from .constants import Constants
from .introspect import NAME, attention_name
from .selection import Selection
from .vision_tower import Tower

ATTACHMENT_ATTRIBUTE = "_gap_attachment"
ENCODER_ATTRIBUTE = "_gap_encoder"  # on a decoder alone: what encodes images for it
LAYOUTS = 32
"""How many layouts stay in memory, each for prompts with other numbers of visual tokens or sizes of images."""

attach_lock = threading.RLock()  # held while hooks are put on a model or taken off


@dataclass(eq=False)
class Attachment:
    """What `attach` put on one model.

    Attributes:
        config: The configuration that the next call reads.
        owner: The module that receives ``input_ids`` or ``visual_mask``; ``text`` itself for a decoder without a VLM.
        text: The decoder stack.
        layers: Its layers that carry the hooks; the model may have other layers by now. Empty where it is ``resting``.
        windows: By layer, the sliding window of its attention in tokens; None where it attends to everything.
        chunks: By layer, how many tokens make a chunk that its attention does not look out of; None where there are none.
        kinds: By layer, its kind in the words of transformers, such as ``"full_attention"``.
        survivors_only: Not all of the decoder's layers can be handed other inputs than its loop hands them. What is dropped
            before the decoder never gets to it, where nothing is dropped in it.
        own_attention: The decoder's attention is more than `NAME` computes: it keeps its own implementation.
        heads: The modules with a language head around ``owner``, as far as they are known.
        tower: The vision encoder, once a configuration needs something of it.
        records_sizes: The encoders record the sizes of their images, once a configuration needs positions in them.
        layouts: Where the visual tokens of prompts stand, by what decides that; of the tower that is there.
        projector_is_last: The decoder gets the output of the tower's projector unchanged; None until a prompt has shown it.
        handles: Removers of the hooks on everything but the layers and the vision encoder.
        layer_handles, tower_handles: Removers of the hooks on those.
        restore: The attention implementation that `attach` replaced, None where the model was loaded under our name.
        running: The calls that are running, and the thread of each: forwards, and whole generations, of which it is None.
        closing: Detached; the hooks stay until no call is running, and do nothing in new ones.
        resting: The configuration keeps everything: layers carry hooks only while a call is running that needs them.
    """

    config: GapConfig
    owner: PreTrainedModel
    text: PreTrainedModel
    layers: tuple[nn.Module, ...] = ()
    windows: tuple[int | None, ...] = ()
    chunks: tuple[int | None, ...] = ()
    kinds: tuple[str, ...] = ()
    survivors_only: bool = False
    own_attention: bool = False
    heads: list[PreTrainedModel] = field(default_factory=list)
    tower: Tower | None = None
    records_sizes: bool = False
    layouts: Constants = field(default_factory=lambda: Constants(LAYOUTS))
    projector_is_last: bool | None = None
    handles: list[Any] = field(default_factory=list)
    layer_handles: list[Any] = field(default_factory=list)
    tower_handles: list[Any] = field(default_factory=list)
    restore: str | None = None
    running: dict[Any, int | None] = field(default_factory=dict)
    closing: bool = False
    resting: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": {}}  # of a copy or a pickle no call is under way

    def modules(self) -> list[PreTrainedModel]:
        """Return the modules that carry hooks for a whole forward, outermost first."""
        return list(dict.fromkeys((*self.heads, self.owner, self.text)))

    def prunes(self, module: nn.Module) -> bool:
        """Return whether a forward of ``module`` prunes: neither in training mode nor under another attention."""
        runs_under_name = self.own_attention or attention_name(self.text.config) == NAME
        return runs_under_name and not (module.training or self.text.training)

    def is_running(self) -> bool:
        """Return whether a call is under way.

        Torch runs no hook after a forward that was interrupted (Ctrl-C), so one that is in no thread's stack any more is
        forgotten here. A generation ends by itself.
        """
        if any(thread is not None for thread in self.running.values()):
            frames = sys._current_frames()
            for call, thread in list(self.running.items()):
                if thread is not None and not self._is_called_in(frames.get(thread)):
                    self.running.pop(call, None)
        return bool(self.running)

    def _is_called_in(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if "_call_impl" in frame.f_code.co_name:
                module = frame.f_locals.get("self")
                if isinstance(module, nn.Module) and attachment_of(module) is self:
                    return True
            frame = frame.f_back
        return False

    def close(self) -> None:
        """Take everything off, at once or, if calls are running, when the last one ends."""
        self.closing = True
        self.settle()

    def settle(self) -> None:
        """If no call is running, take off a model what nothing needs any more: everything, where it was detached."""
        with attach_lock:
            if self.is_running():
                return
            if self.resting:
                for handle in self.layer_handles:
                    handle.remove()
                self.layer_handles, self.layers = [], ()
            if not self.closing:
                return
            for handle in reversed((*self.handles, *self.layer_handles, *self.tower_handles)):
                handle.remove()
            self.handles, self.layer_handles, self.tower_handles = [], [], []
            for module in self.modules():
                if module.__dict__.get(ATTACHMENT_ATTRIBUTE) is self:
                    object.__delattr__(module, ATTACHMENT_ATTRIBUTE)
            restore, self.restore = self.restore, None
            if restore is not None and self.text.config._attn_implementation == NAME:
                self.text.set_attn_implementation(restore)


def attachment_of(module: Any) -> Attachment | None:
    """Return the attachment whose hooks ``module`` carries for a whole forward."""
    return module.__dict__.get(ATTACHMENT_ATTRIBUTE)


def encoder_of(owner: PreTrainedModel) -> Any:
    """Return the module that encodes images: ``owner``, or what `gap_triton.models` has put before a decoder alone."""
    return owner.__dict__.get(ENCODER_ATTRIBUTE, owner)


_selections = threading.local()


def remember_selection(attachment: Attachment, selection: Selection) -> None:
    """Store the selection of the forward that has just run in this thread."""
    if not hasattr(_selections, "by_attachment"):
        _selections.by_attachment = weakref.WeakKeyDictionary()
    _selections.by_attachment[attachment] = selection


def recall_selection(attachment: Attachment) -> Selection | None:
    """Return the last selection made under ``attachment`` in this thread."""
    by_attachment = getattr(_selections, "by_attachment", None)
    return None if by_attachment is None else by_attachment.get(attachment)
