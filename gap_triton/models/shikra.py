"""Shikra (arXiv 2306.15195): CLIP ViT-L/14 at 224 pixels, 256 visual tokens (16 x 16), one linear layer, Vicuna-7B.

Layout, read in the authors' code (github.com/shikras/shikra, ``mllm/models/shikra``): the checkpoint is that of a
`LlamaForCausalLM` with ``model.mm_projector.weight`` and ``.bias`` added; the vision tower is not in it. The features are
those of CLIP's hidden state -2 without the class token. What could not be verified, because the released files were not
at hand: that the released config.json holds ``mm_vision_select_layer`` (-2, the value of the authors' configuration, is
taken where it does not).
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from .visual_decoder import IMAGE_TOKEN, Tower, VisualDecoder, refuse_keys

VISION_TOWER = "openai/clip-vit-large-patch14"
SELECT_LAYER = -2
VISUAL_TOKENS = 256
IMAGE, START, PATCH, END = "<image>", "<im_start>", "<im_patch>", "<im_end>"


class ClipPatches(Tower):
    """Patch features of one hidden state of CLIP's vision tower."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map [I, 3, H, W] to [I, N, F], row by row."""
        states = self.model(pixel_values, output_hidden_states=True).hidden_states
        return states[self.config.vision_feature_layer][:, 1:]


class ShikraLlama(LlamaForCausalLM):
    """Llama with the projector where Shikra's checkpoint has it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.mm_projector = nn.Linear(config.mm_hidden_size, config.hidden_size)
        self.post_init()


def load(
    checkpoint: str | PathLike[str],
    vision_tower: str | PathLike[str] = VISION_TOWER,
    *,
    dtype: torch.dtype = torch.float16,
    attn_implementation: str = "sdpa",
) -> VisualDecoder:
    """Read a Shikra checkpoint.

    The authors released the difference to Llama-7B; add it with their ``apply_delta.py`` first.

    Args:
        checkpoint: Folder (or hub id) with config.json and the weights as the authors' training saves them.
        vision_tower: Folder or hub id of the CLIP vision tower.
        dtype: Of all weights.
        attn_implementation: Of the decoder; ``"gap_triton"`` prunes.

    Returns:
        The model in eval mode.

    Raises:
        ValueError: Keys of the checkpoint are missing or unknown; the message lists them.
    """
    clip = CLIPVisionModel.from_pretrained(vision_tower, dtype=dtype)
    # Its model_type is "shikra", which transformers does not have.
    fields, _ = LlamaConfig.get_config_dict(checkpoint)
    fields |= {"model_type": LlamaConfig.model_type, "mm_hidden_size": clip.config.hidden_size}
    config = LlamaConfig.from_dict(fields)
    decoder, report = ShikraLlama.from_pretrained(
        checkpoint,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
    )
    source = f"The Shikra checkpoint {checkpoint}"
    refuse_keys(source, missing=report["missing_keys"], unexpected=report["unexpected_keys"])
    projector = decoder.model.mm_projector
    del decoder.model.mm_projector
    layer = getattr(config, "mm_vision_select_layer", SELECT_LAYER)
    return VisualDecoder(ClipPatches(clip, layer), projector, decoder).eval()


def prompt_ids(tokenizer: Any, text: str, visual_tokens: int = VISUAL_TOKENS) -> torch.Tensor:
    """Return the token ids of a prompt in which ``<image>`` stands for an image.

    The authors' prompts follow the ``vicuna_v1.1`` template ("USER: ... ASSISTANT:" after the system prompt); boxes are
    written [x0,y0,x1,y1] with three decimals, relative to the image padded to a square.

    Args:
        tokenizer: The checkpoint's, which knows ``<im_start>``, ``<im_patch>`` and ``<im_end>``.
        text: The whole prompt.
        visual_tokens: Per image.

    Returns:
        [1, Q] int64, ``-1`` at visual tokens.

    Raises:
        ValueError: The tokenizer does not know the three tokens.
    """
    known = tokenizer.get_vocab()
    unknown = [token for token in (START, PATCH, END) if token not in known]
    if unknown:
        raise ValueError(
            f"tokenizer does not know {', '.join(unknown)}: expected the tokenizer of a Shikra checkpoint"
        )
    ids = tokenizer(text.replace(IMAGE, START + PATCH * visual_tokens + END), return_tensors="pt").input_ids
    return ids.masked_fill(ids == known[PATCH], IMAGE_TOKEN)
