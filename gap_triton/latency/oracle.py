"""The fastest that a pruned model can be: the same layers, handed the rows that survive, with nothing around them.

It shares no code with the hooks. It knows beforehand which rows survive, so it scores and selects nothing; and it decodes
with the model as it is, on a KV cache whose later layers are shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

# The axis of the tokens in what a decoder hands its layers.
TOKEN_AXIS = {"position_ids": -1, "cache_position": -1, "position_embeddings": -2, "mm_token_type_ids": -1}
# What needs no cut. A layer that is handed more may need one that is not known here.
UNCHANGED = ("past_key_values", "past_key_value", "cache", "use_cache", "output_attentions", "logits_to_keep")


@dataclass
class Survivors:
    """The rows that go on from one layer of the decoder.

    Attributes:
        first_later: The first layer that sees no other rows.
        rows: [L] int64, rows of the whole prompt, the same in every sample.
        hidden_states: [B, L, C], what the layer is handed in place of the rows, where tokens are merged; else None.
    """

    first_later: int
    rows: Tensor
    hidden_states: Tensor | None = None
    cut: dict[int, tuple[Any, Any]] = field(default_factory=dict)


class Oracle:
    """A model whose later layers are handed the surviving rows."""

    def __init__(self, model: Any, text: Any, survivors: Sequence[Survivors], prompt_tokens: int) -> None:
        """Make one of a model without hooks.

        Args:
            model: The model; nobody else uses its modules.
            text: Its decoder.
            survivors: What goes on, in the order of the layers.
            prompt_tokens: Q, the length of the prompt that is pruned.
        """
        self.model = model
        self.config = text.config
        self.layers: list[nn.Module] = list(text.layers)
        self.survivors = list(survivors)
        self.prompt_tokens = prompt_tokens
        self.static_length: int | None = None

    def dropped(self, index: int) -> int:
        """How many rows of the prompt layer ``index`` does not see."""
        seen = [len(each.rows) for each in self.survivors if each.first_later <= index]
        return self.prompt_tokens - seen[-1] if seen else 0

    def dynamic_cache(self) -> DynamicCache:
        """An empty cache that grows."""
        return DynamicCache(config=self.config)

    def static_cache(self, length: int) -> StaticCache:
        """An empty cache for ``length`` tokens, dropped ones included, whose later layers have no room for those.

        Raises:
            ValueError: A layer keeps a window of tokens only.
        """
        cache = StaticCache(config=self.config, max_cache_len=length)
        for index, layer in enumerate(cache.layers):
            if getattr(layer, "is_sliding", False) or not hasattr(layer, "cumulative_length"):
                raise ValueError(
                    "a static KV cache whose layers count their own tokens, all of them, is needed here"
                )
            layer.max_cache_len = length - self.dropped(index)
        if self.static_length is None:
            self.static_length = length
            for index, layer_module in enumerate(self.layers):
                lacks = self.dropped(index) - self.dropped(0)
                if lacks:
                    layer_module.forward = _narrowed(layer_module.forward, lacks)
        return cache

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Hand the later layers the surviving rows of a prompt for as long as this lasts."""
        first = self.survivors[0].first_later
        before = {layer: layer.__dict__.get("forward") for layer in self.layers[first:]}
        for index, layer in enumerate(self.layers):
            if index >= first:
                layer.forward = self._shortened_forward(type(layer).forward.__get__(layer), index)
        try:
            yield
        finally:
            for layer, forward in before.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward
            for each in self.survivors:
                each.cut.clear()

    def _shortened_forward(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        passed = [each for each in self.survivors if each.first_later <= index]
        here, rows = passed[-1], passed[-1].rows
        if here.first_later == index and len(passed) > 1:
            rows = torch.searchsorted(
                passed[-2].rows, rows
            )  # where they stand among those of the stage before

        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise ValueError(f"{type(self.layers[index]).__name__} is handed arguments by position")
            if index == here.first_later:
                hidden_states = hidden_states[:, rows] if here.hidden_states is None else here.hidden_states
            return forward(
                hidden_states, **{name: self._cut(here, name, value) for name, value in kwargs.items()}
            )

        return run

    def _cut(self, survivors: Survivors, name: str, value: Any) -> Any:
        """A layer's argument for the surviving rows; made once for all layers that are handed the same."""
        if value is None or name in UNCHANGED or not isinstance(value, (Tensor, tuple)):
            return value
        known = survivors.cut.get(id(value))
        if known is not None:
            return known[1]
        rows = survivors.rows
        cut: Any
        if name == "attention_mask" and isinstance(value, Tensor):
            cut = self._mask(value, survivors)
        elif name not in TOKEN_AXIS:
            raise ValueError(
                f"the layers are handed {name}, and it isn't known how to cut it down to the survivors"
            )
        elif isinstance(value, tuple):
            cut = tuple(each.index_select(each.dim() + TOKEN_AXIS[name], rows) for each in value)
        else:
            cut = value.index_select(value.dim() + TOKEN_AXIS[name], rows)
        survivors.cut[id(value)] = (value, cut)  # holds on to the value, so that no other can get its id
        return cut

    def _mask(self, mask: Tensor, survivors: Survivors) -> Tensor:
        rows = survivors.rows
        if self.static_length is None:
            return mask[:, :, rows][..., rows]
        # Its columns are those of the first layer's buffer. Without padding and windows it is causal, and no more.
        count = len(rows)
        width = self.static_length - self.prompt_tokens + count
        columns = torch.arange(width, device=mask.device)
        return (columns <= columns[:count, None])[None, None]


def _narrowed(forward: Callable[..., Any], lacks: int) -> Callable[..., Any]:
    """A decode step of a layer whose buffer lacks columns that the first layer's has; the mask is that one's."""

    def run(hidden_states: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        # Column j of the first layer's buffer is column j - lacks of this one's, for all that is generated.
        mask = None if attention_mask is None else attention_mask[..., lacks:]
        return forward(hidden_states, *args, attention_mask=mask, **kwargs)

    return run
