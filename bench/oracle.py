"""What a pruned model could be at best: the same model that is handed the shorter prompt in its later layers, no hooks.

It is told which rows survive. Its later layers are a model of their own, on the same weights, which sees only those rows,
at their own positions: what it computes, a pruned model must compute, and what it takes is the least that it could take.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import Tensor, nn

from bench.models import Prompt, sharing_weights


def cache_argument(module: nn.Module) -> str:
    """How a forward calls its cache: renamed in transformers 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def text_model(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The decoder that holds the layers."""
    return next(module for module in model.modules() if hasattr(module, "layers") and hasattr(module, "norm"))


class Oracle:
    """A model in two parts.

    Args:
        model: One with no hooks, whose weights are shared.
        layer: The last layer that sees the whole prompt.
    """

    def __init__(self, model: transformers.PreTrainedModel, layer: int) -> None:
        text = text_model(model)
        self.head = model.get_output_embeddings()
        self.embed = model.get_input_embeddings()
        self.early, self.late = _part(text, 0, layer + 1), _part(text, layer + 1, len(text.layers))
        self.early.norm = nn.Identity()
        self.cache = cache_argument(text)

    def prefill(self, prompt: Prompt, index: Tensor) -> tuple[Tensor, list[Any]]:
        """Logits [1, 1, N] of the last row, and both caches; ``index`` [1, L] names the rows that survive."""
        caches = [transformers.DynamicCache(), transformers.DynamicCache()]
        hidden = self._run(self.early, prompt.embeds, prompt.position_ids, caches[0])
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
        ids = prompt.position_ids
        ids = ids.gather(-1, index.expand(*ids.shape[:-1], -1))
        return self.head(self._run(self.late, hidden, ids, caches[1])[:, -1:]), caches

    def decode(self, token: Tensor, position_ids: Tensor, caches: list[Any]) -> Tensor:
        """Logits [1, 1, N] behind a token of the answer, [1, 1]."""
        hidden = self._run(self.early, self.embed(token), position_ids, caches[0])
        return self.head(self._run(self.late, hidden, position_ids, caches[1]))

    def _run(self, part: nn.Module, hidden: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        result = part(inputs_embeds=hidden, position_ids=position_ids, use_cache=True, **{self.cache: cache})
        return result.last_hidden_state


def _part(text: transformers.PreTrainedModel, start: int, end: int) -> Any:
    """Some layers of a decoder as one of their own, numbered from 0."""
    part = sharing_weights(text)
    part.layers = part.layers[start:end]
    for number, layer in enumerate(part.layers):
        layer.self_attn.layer_idx = number
    part.config.num_hidden_layers = len(part.layers)
    if getattr(part.config, "layer_types", None):
        part.config.layer_types = part.config.layer_types[start:end]
    return part


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert logits.shape == expected.shape, f"shapes differ: {list(logits.shape)} and {list(expected.shape)}"
    return float((logits.double() - expected.double()).norm() / expected.double().norm())
