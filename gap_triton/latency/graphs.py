"""Prefills and decode steps as CUDA graphs, on static caches: what is launched is launched by one call of the host.

The vision encoder, the projector and the embeddings run as they come, as models read values there. What follows, the decoder
and its head on a prompt that was prepared, is captured once and replayed on the next embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import GapConfig, prepare
from ..arguments import CACHE, VISUAL_MASK, VISUAL_PROMPT
from ..config import BEFORE_THE_DECODER
from ..integration.prepare import SIZE_FIELDS
from ..introspect import visual_token_ids
from ..vision.needs import needs_of
from .subjects import Subject
from .variants import ATTACHED, PRUNED, Variant, decoder_of, graphed, share, variants_of

WARM_UP = 3
"""Runs before a capture."""
EMBEDS, IDS = "inputs_embeds", "position_ids"
# Tensors that a decoder is handed, and which are copied or need not be: there is no padding.
HANDED = (EMBEDS, IDS, "attention_mask", "cache_position")


def refuse_without_cuda(device: torch.device) -> None:
    """Raise ValueError where there is nothing to capture on."""
    if device.type != "cuda":
        raise ValueError(
            f"--graph captures CUDA graphs, which need a GPU, and the device is {device}: leave --graph out"
        )


def capture(function: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture what ``function`` launches, after running it `WARM_UP` times on a side stream.

    The runs before compile kernels, choose algorithms and allocate what lasts, none of which a capture can do. The capture
    itself computes nothing: results are there after a replay.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


@contextmanager
def emptied(cache: Any) -> Iterator[None]:
    """Empty a static cache, and let it say so by a number of the host for as long as this lasts: around a prefill.

    A static cache counts on the device, and a prefill asks whether anything is in it already. Of one that was never written
    to it need not read that; of one that was reset it would, which a capture can't do.

    Args:
        cache: A static cache, written to before.
    """
    cache.reset()
    cache.get_seq_length = lambda layer_idx=0: 0
    try:
        yield
    finally:
        del cache.get_seq_length


class _Reached(Exception):
    """The decoder was called, with these arguments."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class Front:
    """What a model does before its decoder."""

    def __init__(self, subject: Subject) -> None:
        """Take modules of their own, without hooks of pruning.

        Raises:
            ValueError: The decoder is handed more than embeddings and position ids.
        """
        self.model = share(subject.model)
        self.inputs = subject.inputs
        decoder_of(self.model).register_forward_pre_hook(_stop, with_kwargs=True)
        others = [
            name for name, value in self._arguments().items() if name not in HANDED and _holds_tensors(value)
        ]
        if others:
            raise ValueError(
                f"--graph copies embeddings and position ids, and the decoder of {type(self.model).__name__} is handed "
                f"{others[0]} as well: leave --graph out"
            )

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Return the embeddings of the prompt [B, Q, C], and its position ids where the model makes them."""
        arguments = self._arguments()
        return {name: arguments[name] for name in (EMBEDS, IDS) if arguments.get(name) is not None}

    @torch.no_grad()
    def _arguments(self) -> dict[str, Any]:
        try:
            self.model(**self.inputs, use_cache=False)
        except _Reached as reached:
            return reached.arguments
        raise ValueError(
            f"{type(self.model).__name__} did not call its decoder, so there is nothing to capture"
        )


def _stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    raise _Reached(kwargs)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) for each in value)
    )


@dataclass
class Captured(Variant):
    """A variant whose prefill, from the embeddings on, and whose decode steps are replays.

    Attributes:
        front: Makes the embeddings and the position ids.
        given: What else its prefill takes.
    """

    holds_memory: ClassVar[bool] = True

    front: Callable[[], dict[str, Tensor]] = field(kw_only=True)
    given: dict[str, Any] = field(kw_only=True)
    handed: dict[str, Tensor] = field(init=False)
    ids: Tensor = field(init=False)
    logits: Tensor = field(init=False)
    prompt_logits: Tensor = field(init=False)
    reading: torch.cuda.CUDAGraph = field(init=False)
    stepping: torch.cuda.CUDAGraph = field(init=False)

    @torch.no_grad()
    def capture(self) -> None:
        """Capture the prefill and a decode step; nothing else runs the model, or changes its cache, from here on."""
        self.handed = {name: value.clone() for name, value in self.front().items()}
        # Of another prompt: a replay that reads what the capture has left, and not its inputs, is not right then.
        self.handed[EMBEDS] = self.handed[EMBEDS].flip(1)
        self.cache = self.make_cache()
        self.ids = self.next_ids.clone(memory_format=torch.contiguous_format)
        self.token = torch.zeros_like(self.ids[0] if self.ids.dim() == 3 else self.ids)
        self.reading = capture(self.read_prompt, self.ids.device)
        self.prompt_logits = self.logits
        self.reading.replay()  # a step follows a prompt
        self.stepping = capture(self.take_step, self.ids.device)

    def read_prompt(self) -> None:
        """Read the prompt that `handed` holds: what is captured of a prefill."""
        with emptied(self.cache), self.prefilling():
            output = self.model(
                **self.handed, **self.given, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1
            )
        self.ids.copy_(self.next_ids)
        self._write(output)

    def take_step(self) -> None:
        """Generate one more token: what is captured of a decode step."""
        output = self.model(
            input_ids=self.token,
            position_ids=self.ids,
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=1,
        )
        self.ids.add_(1)
        self._write(output)

    def _write(self, output: Any) -> None:
        self.logits = output.logits[:, -1]
        self.token.copy_(self.logits.argmax(-1, keepdim=True))

    def prefill(self) -> Tensor:
        """Make embeddings, copy them and replay; returns the logits of the last token [B, vocabulary]."""
        for name, value in self.front().items():
            self.handed[name].copy_(value)
        self.reading.replay()
        return self.prompt_logits

    def decode(self) -> Tensor:
        """Replay a decode step; returns its logits [B, vocabulary]."""
        self.stepping.replay()
        return self.logits


def refuse_what_is_not_captured(config: GapConfig) -> None:
    """Refuse a configuration whose prefill needs something that is not there at a replay.

    Raises:
        ValueError: It ranks, compares or merges by what the vision encoder makes, or draws numbers on the host.
    """
    if needs_of(config):
        raise ValueError(
            "--graph captures the decoder, and this configuration chooses or merges by what the vision encoder makes, which "
            "is not in the graph: leave --graph out, or choose by a score of the decoder, such as text or last_token"
        )
    if any(stage.score == "random" and stage.layer != BEFORE_THE_DECODER for stage in config.stages):
        raise ValueError(
            "--graph does not go with score 'random' at a layer of the decoder, which draws on the host: leave --graph out, "
            "or choose by another score"
        )


def captured_variants(subject: Subject, config: GapConfig, *, steps: int) -> list[Captured]:
    """Capture the model without pruning, pruned, and the oracle, each on a static cache of its own.

    Args:
        subject: The model and its inputs.
        config: What to prune.
        steps: How many tokens will be generated behind the prompt, at most.

    Raises:
        ValueError: The model can't be pruned so, or it is not known how to capture it.
    """
    refuse_what_is_not_captured(config)
    front, made = Front(subject), []
    for each in variants_of(subject, config, steps=steps, static=True):
        if each.name == ATTACHED:
            continue
        given = prepared_for(each.model, subject) if each.name == PRUNED else {}
        made.append(
            Captured(
                graphed(each.name), each.model, each.inputs, each.next_ids, each.make_cache, each.prefilling, front=front,
                given=given,
            )
        )  # fmt: skip
        made[-1].capture()
    return made


def prepared_for(model: Any, subject: Subject) -> dict[str, Any]:
    """What a pruned prefill takes beside embeddings and position ids: where the visual tokens are, on host and device."""
    ids = subject.inputs["input_ids"].cpu()
    visual = torch.isin(ids, torch.tensor(visual_token_ids(model.config)))
    sizes = {name: subject.inputs[name].cpu() for name in SIZE_FIELDS if name in subject.inputs}
    prompt = prepare(model, {VISUAL_MASK: visual, **sizes})[VISUAL_PROMPT]
    return {
        VISUAL_MASK: visual.to(subject.device),
        VISUAL_PROMPT: prompt,
        **{name: subject.inputs[name] for name in sizes},
    }
