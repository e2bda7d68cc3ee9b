"""The other oracle: the decoder run by itself on the survivors alone, for decoders in which masking a column means nothing.

A recurrent state or a convolution has taken every token in, so no column can be hidden from it. What is right there is what
the plain decoder of transformers computes of a sequence that never held the dropped tokens, each survivor with its own
position id. It is run sample by sample, without padding and without a cache, over prompt and answer at once, so it shares
neither filler nor caches nor steps with what it checks, and no code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import gap_triton
from gap_triton import GapConfig

from . import families
from .comparison import TOLERANCE
from .oracle import core_of
from .tiny import generate

TOKENS = 4
CONFIG = GapConfig(keep=0.4, layer=-1, score="random")
# Of long inputs whose logits are tens: in float64 they agree to 1e-5, where a model has no states in float32 to 1e-9.
LARGE_LOGITS = 5 * TOLERANCE
WORDS = 150  # ids from here on are placeholders, which `generate` is told not to write


# Arguments of a decoder that say nothing of its rows, or that the oracle makes by itself.
MADE_ANEW = ("cache", "past_key_values", "attention_mask", "use_cache", "logits_to_keep", "input_ids")


class SurvivorsOracle:
    """Lets ``model``'s decoder see, of each sample, the rows ``stays`` [B, T] only; other rows come out as zeros.

    ``prompt`` is the number of rows before the answer.
    """

    def __init__(self, model: PreTrainedModel, stays: torch.Tensor, prompt: int) -> None:
        self.text: Any = core_of(model)[1]
        self.stays, self.prompt = stays, prompt

    def __enter__(self) -> SurvivorsOracle:
        self.forward = self.text.forward
        self.text.forward = self._run
        return self

    def __exit__(self, *_: object) -> None:
        del self.text.forward

    def _run(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        full = torch.zeros_like(inputs_embeds)
        for name in MADE_ANEW:
            kwargs.pop(name, None)
        for sample, stays in enumerate(self.stays):
            rows = stays.nonzero()[:, 0]
            first = int(rows[0])  # of the tokens that are no padding
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = torch.arange(self.stays.shape[1])[None]
            own = {name: self._rows_of(name, value, sample, rows) for name, value in kwargs.items()}
            with relative_distances(self.text, rows), places(self.text):
                output = self.forward(
                    inputs_embeds=inputs_embeds[sample : sample + 1, rows],
                    attention_mask=self._mask(rows - first),
                    use_cache=False,
                    **own,
                )
            full[sample, rows] = output[0][0]
        output["last_hidden_state"] = full
        return output

    def _rows_of(self, name: str, value: Any, sample: int, rows: torch.Tensor) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if name == "position_ids":
            return value[..., min(sample, value.shape[-2] - 1), :][..., None, rows]
        return value[min(sample, len(value) - 1)][None, rows]

    def _mask(self, positions: torch.Tensor) -> Any:
        """A mask of ones, or by layer type where layers look at how far apart tokens stand."""
        kinds = set(getattr(self.text.config, "layer_types", None) or ())
        ones = torch.ones(1, len(positions), dtype=torch.long)
        if not kinds & {*WINDOWS, "chunked_attention", "reference_sliding_attention"}:
            return ones
        config, query, key = self.text.config, positions[:, None], positions[None]
        causal = key <= query
        masks = {
            "full_attention": causal,
            "indexed_attention": causal,
            "sliding_attention": causal & (key > query - (getattr(config, "sliding_window", None) or 0)),
        }
        if "chunked_attention" in kinds:
            chunk = config.attention_chunk_size
            masks["chunked_attention"] = causal & (key // chunk == query // chunk)
        if "reference_sliding_attention" in kinds:
            of_prompt = key < positions[-1] + 1 - (self.stays.shape[1] - self.prompt)
            masks["reference_sliding_attention"] = causal & (
                of_prompt | (key > query - config.sliding_window)
            )
        if config._attn_implementation == "eager":
            least = torch.finfo(torch.float32).min
            masks = {kind: torch.zeros(mask.shape).masked_fill(~mask, least) for kind, mask in masks.items()}
        by_kind = {kind: mask[None, None] for kind, mask in masks.items()}
        if not kinds <= by_kind.keys():
            by_kind |= {"linear_attention": ones, "conv": ones}
        return by_kind


class LaterLayersOracle(SurvivorsOracle):
    """The same for layers behind ``layer`` only: those up to it see every token that is no padding."""

    def __init__(
        self, model: PreTrainedModel, stays: torch.Tensor, real: torch.Tensor, prompt: int, layer: int
    ):
        """``real`` [B, T] are the rows that are no padding."""
        super().__init__(model, stays, prompt)
        self.real, self.layer = real, layer

    def _run(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        stays, self.stays = self.stays, self.real
        full, every = torch.zeros_like(inputs_embeds), self.real
        outputs = []
        for sample in range(len(stays)):
            self.left = stays[sample][every[sample]].nonzero()[:, 0]  # among the tokens that are no padding
            handles = [
                each.register_forward_pre_hook(self._shorten, with_kwargs=True)
                for each in self.text.layers[self.layer + 1 :]
            ]
            self.stays = every[sample : sample + 1]
            mine = {name: self._sample_of(name, value, sample) for name, value in kwargs.items()}
            try:
                outputs.append(self._run_whole(inputs_embeds[sample : sample + 1], **mine))
            finally:
                for handle in handles:
                    handle.remove()
            full[sample, stays[sample]] = outputs[-1][0][0]
        self.stays = stays
        outputs[-1]["last_hidden_state"] = full
        return outputs[-1]

    def _run_whole(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        for name in MADE_ANEW:
            kwargs.pop(name, None)
        rows = self.stays[0].nonzero()[:, 0]
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(self.stays.shape[1])[None]
        own = {name: self._rows_of(name, value, 0, rows) for name, value in kwargs.items()}
        self.positions = rows - rows[0]
        mask = self._mask(self.positions)
        return self.forward(inputs_embeds=inputs_embeds[:, rows], attention_mask=mask, use_cache=False, **own)

    @staticmethod
    def _sample_of(name: str, value: Any, sample: int) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        axis = value.dim() - 2 if name == "position_ids" else 0
        return value.narrow(axis, min(sample, value.shape[axis] - 1), 1)

    def _shorten(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        whole = len(self.positions)

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(cut, value))
            by_token = isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[1] == whole
            return value[:, self.left] if by_token else value

        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 4:
            mask = mask[:, :, self.left][..., self.left]
        elif mask is not None:
            mask = cut(mask)
        return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()} | {
            "attention_mask": mask
        }


WINDOWS = ("sliding_attention", "hybrid_sliding")


@contextmanager
def relative_distances(text: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Inkling has no rotary embedding but a bias by distance, which it counts by itself: here between ``positions``."""
    module: Any = sys.modules[type(text).__module__]
    count = getattr(module, "get_relative_distance", None)
    if count is None:
        yield
        return
    module.get_relative_distance = lambda *_, **__: positions[:, None] - positions[None]
    try:
        yield
    finally:
        module.get_relative_distance = count


@contextmanager
def places(text: nn.Module) -> Iterator[None]:
    """MiniMax M3 compares position ids with places among the keys that there are: here both are places."""
    attentions = [layer.self_attn for layer in text.layers if getattr(layer, "self_attn", None) is not None]
    counting = [each for each in attentions if hasattr(getattr(each, "indexer", None), "build_block_mask")]

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "position_ids": torch.arange(hidden_states.shape[1])}

    handles = [each.register_forward_pre_hook(count, with_kwargs=True) for each in counting]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Inputs = dict[str, torch.Tensor]


def pruned_by(model: PreTrainedModel, inputs: Inputs, config: GapConfig = CONFIG, **options: object):
    """What the pruned model generates, and which rows of the prompt stay, [B, Q] bool."""
    with families.visual_features(model), gap_triton.pruning(model, config):
        output = generate(model, inputs, tokens=TOKENS, **options)
        selection = gap_triton.last_selection(model)
    return output, None if selection is None else stays_of(selection, inputs["attention_mask"])


def stays_of(selection: gap_triton.Selection, mask: torch.Tensor) -> torch.Tensor:
    """Which rows of a prompt with the padding ``mask`` [B, Q] stay, [B, Q] bool."""
    stays = torch.zeros(*mask.shape, dtype=torch.bool)
    for sample, rows in enumerate(selection.index.tolist()):
        stays[sample, [row for row in rows if row >= 0]] = True
    assert bool((mask.bool() & ~stays).any(dim=1).all())
    return stays & mask.bool()


def with_answer(model: PreTrainedModel, inputs: Inputs, sequences: torch.Tensor) -> Inputs:
    """The prompt and what was generated after it as one input, with the ids that `generate` gives them."""
    batch, prompt = inputs["input_ids"].shape
    answer = sequences.shape[1] - prompt

    def extended(value: torch.Tensor, by: int) -> torch.Tensor:
        whole = value.shape[:2] == (batch, prompt)
        return torch.nn.functional.pad(value, (0, answer), value=by) if whole else value

    whole = {name: extended(value, int(name == "attention_mask")) for name, value in inputs.items()}
    if not hasattr(core_of(model)[0], "get_rope_index"):
        whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**whole, "input_ids": sequences}


def expected_of(
    reference: PreTrainedModel,
    inputs: Inputs,
    sequences: torch.Tensor,
    stays: torch.Tensor | None,
    features: bool = True,
    layer: int = -1,
    before: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Logits of each generated token by the plain decoder on the survivors alone; of all tokens where ``stays`` is None.

    Without ``features`` the images are those of the model's own vision encoder. Layers up to ``layer`` see every token, or
    those that stay ``before`` the decoder.
    """
    prompt = inputs["input_ids"].shape[1]
    whole = with_answer(reference, inputs, sequences)
    if stays is None:
        stays = inputs["attention_mask"].bool()
    seen = inputs["attention_mask"].bool() if before is None else before
    stays, seen = (
        torch.nn.functional.pad(rows, (0, sequences.shape[1] - prompt), value=True) for rows in (stays, seen)
    )
    oracle = SurvivorsOracle(reference, stays, prompt)
    if layer >= 0:
        oracle = LaterLayersOracle(reference, stays, seen, prompt, layer)
    filled = families.visual_features(reference) if features else nullcontext()
    with torch.no_grad(), filled, oracle:
        logits = reference(**whole).logits
    return list(logits[:, prompt - 1 : -1].unbind(1))


def difference(output, expected: list[torch.Tensor]) -> float:
    pairs = zip(output.logits, expected, strict=True)
    return max(float((a - b)[:, :WORDS].abs().max()) for a, b in pairs)
