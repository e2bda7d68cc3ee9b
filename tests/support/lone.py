"""Decoders alone, fed merged ``inputs_embeds``, and the oracle for them."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .oracle import MaskingOracle
from .tiny import IMAGE, build

DECODERS = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "mistral-sliding": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
}


def lone(name: str = "llama", implementation: str = "sdpa") -> PreTrainedModel:
    """The decoder of the tiny LLaVA of the same name, as a model of its own."""
    vlm = build(f"llava/{name}")
    config = copy.deepcopy(vlm.config.text_config)
    model = DECODERS[name]._from_config(config, attn_implementation=implementation)
    model.model.load_state_dict(vlm.model.language_model.state_dict())
    model.lm_head.load_state_dict(vlm.lm_head.state_dict())
    return model.eval()


def merged(name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompt with the image features of the tiny LLaVA filled in, and the mask that names them."""
    vlm = build(f"llava/{name}")
    visual = inputs["input_ids"] == IMAGE
    with torch.no_grad():
        embeds = vlm.get_input_embeddings()(inputs["input_ids"])
        tower = vlm.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        embeds[visual] = vlm.model.multi_modal_projector(tower.hidden_states[-1][:, 1:]).flatten(0, 1)
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "visual_mask": visual}


def without(inputs: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in inputs.items() if key not in names}


class LoneOracle(MaskingOracle):
    """The masking oracle of a decoder alone. ``visual``: [B, T] bool over the whole conversation, which may grow."""

    def __init__(self, model: PreTrainedModel, layer: int, keep: float | int, visual: torch.Tensor) -> None:
        whole = nn.Module()  # what the oracle looks for in a vision-language model
        whole.model = nn.Module()
        whole.model.language_model = model.model
        super().__init__(whole, layer, keep)
        self.owner, self.named = model.model, visual

    def _begin(self, module, args, kwargs):
        super()._begin(module, args, kwargs)
        if self.visual.shape[1] > 1:
            self.visual = self.named[:, self.past :]
