"""One answer, and what it took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from gap_triton.arguments import CACHE
from gap_triton.latency.variants import bytes_of_cache


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Length of the answer at most.
        temperature: 0 = the likeliest token each time.
        top_p: Share of the probability that is drawn from; None = the model's own setting.
        top_k: Number of tokens that are drawn from; None = the model's own setting.
        seed: Of the draws.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``; no beams, whose words can't be streamed."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": 1}
        if self.temperature == 0:
            return options | {"do_sample": False}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return (
            options
            | {"do_sample": True}
            | {name: value for name, value in drawn.items() if value is not None}
        )


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took.

    Attributes:
        text: What the model wrote.
        prompt_tokens: Tokens of the prompt, the visual ones before pruning included.
        new_tokens: Tokens that were written.
        first_token_s: Seconds to the first of them, from a processed prompt.
        total_s: Seconds to the last.
        kv_bytes: Keys and values in the cache at the end; None where the cache is not made of these alone.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    total_s: float
    kv_bytes: int | None


class Clock(BaseStreamer):
    """Notes when the first token comes, and hands all of them on.

    ``generate`` gives a streamer the prompt first, then each token as it is read from the device.
    """

    def __init__(self, shown: BaseStreamer | None) -> None:
        self.shown = shown
        self.first: float | None = None
        self._prompt_was_put = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, or a token."""
        if self._prompt_was_put and self.first is None:
            self.first = time.perf_counter()
        self._prompt_was_put = True
        if self.shown is not None:
            self.shown.put(value)

    def end(self) -> None:
        """Take that there are no more."""
        if self.shown is not None:
            self.shown.end()


def generate(model: Any, processor: Any, inputs: Any, sampling: Sampling, streamed: bool) -> Answer:
    """Answer one prompt; where it is ``streamed``, print the words as they come."""
    tokenizer = getattr(processor, "tokenizer", processor)
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streamed else None
    clock = Clock(shown)
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    output = model.generate(**inputs, **sampling.options(), streamer=clock, return_dict_in_generate=True)
    end = time.perf_counter()
    length = inputs["input_ids"].shape[1]
    written = output.sequences[:, length:]
    return Answer(
        text=processor.batch_decode(written, skip_special_tokens=True)[0].strip(),
        prompt_tokens=length,
        new_tokens=written.shape[1],
        first_token_s=(clock.first or end) - start,
        total_s=end - start,
        kv_bytes=kv_bytes(output[CACHE]),
    )


def kv_bytes(cache: Any) -> int | None:
    """Bytes of a KV cache, None where some layer holds something else."""
    layers = getattr(cache, "layers", [])
    if not all(isinstance(getattr(each, "keys", None), torch.Tensor) for each in layers):
        return None
    return bytes_of_cache(cache) if layers else None
