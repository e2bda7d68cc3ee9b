"""Whole decoders with random weights, in the shapes of models that are used; and copies that share their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = 64
"""Rows of text behind the image."""


@dataclass(frozen=True)
class Decoder:
    """A kind of model.

    Attributes:
        name: What reports call it.
        make: Builds it; arguments are its sizes.
        sizes: Sizes of the text model.
        axes: Axes of its position ids.
    """

    name: str
    make: Callable[[dict[str, Any]], transformers.PreTrainedModel]
    sizes: dict[str, Any]
    axes: int = 1

    def of(self, addition: str, **sizes: int) -> Decoder:
        """The same kind with other sizes, and with a name that says so."""
        return replace(self, name=f"{self.name}, {addition}", sizes={**self.sizes, **sizes})


def _spread(sizes: dict[str, Any]) -> float:
    """Standard deviation of weights that leaves attention far from uniform at any width, as 0.02 does at 4096."""
    return float(1.28 * sizes["hidden_size"] ** -0.5)


def _llama(sizes: dict[str, Any]) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(max_position_embeddings=8192, initializer_range=_spread(sizes), **sizes)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def _qwen(sizes: dict[str, Any]) -> transformers.PreTrainedModel:
    """Qwen2.5-VL; its vision tower, which nothing here runs, is small."""
    half = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **sizes,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "initializer_range": _spread(sizes),
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
        | {"out_hidden_size": sizes["hidden_size"]},
        **{name: sizes["vocab_size"] - 1 - i for i, name in enumerate(("image_token_id", "video_token_id"))},
    )
    text = config.get_text_config()
    if hasattr(text, "rope_parameters"):
        text.rope_parameters = rope
    else:  # before transformers 5
        text.rope_theta, text.rope_scaling = rope.pop("rope_theta"), rope
    return transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")


LLAMA = Decoder(
    "llama-7b",
    _llama,
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
)
QWEN = Decoder(
    "qwen2.5-vl-7b",
    _qwen,
    {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    axes=3,
)
DECODERS = (LLAMA, QWEN)
TINY = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_DECODERS = tuple(kind.of("tiny", **TINY) for kind in DECODERS)
"""For trying the script out: a time measured on them says nothing."""


def build(kind: Decoder, device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model with random weights, made on the device: on the host, that of seven billion would take minutes."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return kind.make(kind.sizes).eval()
    finally:
        torch.set_default_dtype(before)


def sharing_weights(module: nn.Module) -> Any:
    """A copy with modules and hooks of its own, and the same tensors."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


@dataclass(frozen=True)
class Prompt:
    """An image and a question.

    Attributes:
        embeds: [1, S, C], the visual rows first.
        visual_mask: [1, S] bool.
        position_ids: [1, S], or [3, 1, S] for M-RoPE, int64.
        answer: [1, N] int64, tokens that are fed one after another, whatever the logits say.
    """

    embeds: Tensor
    visual_mask: Tensor
    position_ids: Tensor
    answer: Tensor

    def ids_behind(self, number: int) -> Tensor:
        """Position ids of a token of the answer."""
        return self.position_ids[..., -1:] + 1 + number


def make_prompt(
    kind: Decoder, model: transformers.PreTrainedModel, visual: int, answer: int, seed: int = 0
) -> Prompt:
    """Random embeddings, and ids one after another; on several axes the image stands in rows and columns."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator(table.device).manual_seed(seed)
    length, width = visual + TEXT, table.shape[1]
    embeds = torch.randn(1, length, width, generator=generator, device=table.device, dtype=table.dtype)
    row = torch.arange(length, device=table.device)
    mask = (row < visual)[None]
    ids = row[None]
    if kind.axes > 1:
        side = max(int(visual**0.5), 1)
        image = row < visual
        text = row - visual + max(-(-visual // side), side)
        down, right = torch.where(image, row // side, text), torch.where(image, row % side, text)
        ids = torch.stack([torch.where(image, 0, text), down, right])[:, None]
    tokens = torch.randint(table.shape[0] - 2, (1, answer), generator=generator, device=table.device)
    return Prompt(embeds, mask, ids, tokens)
