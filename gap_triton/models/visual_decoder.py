"""A vision tower, one linear layer and a decoder: what Shikra and MiniGPT-v2 have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..arguments import VISUAL_ENCODING, VISUAL_GRID, VISUAL_MASK
from ..attachment import ENCODER_ATTRIBUTE
from ..integration.attach import is_attached
from ..integration.supported_models import unwrap

IMAGE_TOKEN = -1  # stands for one visual token in input_ids; no vocabulary has it
MAX_LISTED = 20


class Tower(nn.Module):
    """Features of images by ``model``, a vision tower whose patches make a grid.

    A subclass has a ``forward`` from pixel values [I, 3, H, W] to features [I, N, F], row by row. What else it has is what
    transformers' models have that encode images, so its scores are found as theirs are (`gap_triton.vision_tower`).

    Args:
        model: The vision tower.
        layer: Which of its hidden states the features are, counted from the last where negative; None = what it puts out.

    Attributes:
        patches_per_token: How many patches, neighbours in a row, make one of the N tokens.
        multi_modal_projector: The projector, once a `VisualDecoder` has it.
    """

    patches_per_token = 1
    multi_modal_projector: nn.Linear

    def __init__(self, model: PreTrainedModel, layer: int | None = None) -> None:
        super().__init__()
        self.model, self.config = model, SimpleNamespace(vision_feature_layer=layer)

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Return, as ``pooler_output`` [I, N, C], what the decoder gets of images [I, 3, H, W]."""
        return BaseModelOutputWithPooling(pooler_output=self.multi_modal_projector(self(pixel_values)))

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int] | None:
        """Return rows and columns of visual tokens per image of ``pixel_values`` [I, 3, H, W]; None without a grid."""
        side = self.model.config.patch_size
        return pixel_values.shape[-2] // side, pixel_values.shape[-1] // side


class VisualDecoder(nn.Module):
    """A decoder that reads text and the projected features of images.

    Attributes:
        tower: Maps pixel values [I, 3, H, W] to features [I, N, F], N visual tokens per image, whose rows and columns its
            method ``grid`` returns.
        decoder: The language model, which `gap_triton.attach` takes; also for scores that the tower tells.
    """

    def __init__(self, tower: Tower, projector: nn.Linear, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.tower, self.decoder = tower, decoder
        tower.multi_modal_projector = projector
        object.__setattr__(unwrap(decoder).base_model, ENCODER_ATTRIBUTE, tower)  # no part of the decoder

    @property
    def projector(self) -> nn.Linear:
        """Linear layer from F to the decoder's width."""
        return self.tower.multi_modal_projector

    def merge(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> dict[str, Any]:
        """Return what the decoder reads.

        Args:
            input_ids: [B, Q] int64, ``-1`` at each visual token.
            pixel_values: [I, 3, H, W] for the I images of the batch in order, or None.

        Returns:
            ``inputs_embeds`` [B, Q, C] with the features filled in. And what a decoder takes that is attached:
            ``visual_mask`` [B, Q] bool; ``visual_grid`` (rows, columns), where the images have a grid; ``visual_encoding``,
            what the tower tells.

        Raises:
            ValueError: The images do not have as many visual tokens as ``input_ids`` have places.
        """
        visual = input_ids == IMAGE_TOKEN
        embeds = self.decoder.get_input_embeddings()(input_ids.masked_fill(visual, 0))
        features = embeds.new_empty(0, embeds.shape[-1])
        merged: dict[str, Any] = {VISUAL_MASK: visual}
        if pixel_values is not None:
            encoding = self.tower.get_image_features(pixel_values.to(self.projector.weight.dtype))
            features = encoding.pooler_output.flatten(0, 1)
            merged[VISUAL_ENCODING] = encoding
            if (grid := self.tower.grid(pixel_values)) is not None:
                merged[VISUAL_GRID] = grid
        placeholders = int(visual.sum())
        if placeholders != features.shape[0]:
            images = 0 if pixel_values is None else pixel_values.shape[0]
            raise ValueError(
                f"input_ids hold {placeholders} visual tokens and the {images} images of pixel_values have "
                f"{features.shape[0]}: expected {IMAGE_TOKEN} in input_ids once for each visual token; prompt_ids "
                "puts it there"
            )
        embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.device, embeds.dtype))
        return merged | {"inputs_embeds": embeds}

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run one forward of the decoder on the merged prompt; ``options`` are those of its own forward."""
        return self.decoder(attention_mask=attention_mask, **self._inputs(input_ids, pixel_values), **options)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run `generate` of the decoder on the merged prompt: new tokens only, as always from ``inputs_embeds``.

        Args:
            input_ids: [B, Q] int64, ``-1`` at each visual token.
            pixel_values: [I, 3, H, W], or None.
            attention_mask: [B, Q], 0 at padding; None = no padding.
            **options: Those of transformers' `generate`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = self._inputs(input_ids, pixel_values)
        return self.decoder.generate(attention_mask=attention_mask, **inputs, **options)

    def _inputs(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> dict[str, Any]:
        inputs = self.merge(input_ids, pixel_values)
        return inputs if is_attached(self.decoder) else {"inputs_embeds": inputs["inputs_embeds"]}


def load_exactly(module: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load ``state``, read from ``source``, which must have the keys and shapes of ``module``.

    Raises:
        ValueError: It has others; the message lists them.
    """
    expected = module.state_dict()
    refuse_keys(source, missing=expected.keys() - state.keys(), unexpected=state.keys() - expected.keys())
    shapes = [
        f"{key} is {list(value.shape)}, expected {list(expected[key].shape)}"
        for key, value in state.items()
        if value.shape != expected[key].shape
    ]
    if shapes:
        raise ValueError(f"{source} does not fit: {_listed(shapes)}")
    module.load_state_dict(state)


def refuse_keys(source: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise ValueError if a checkpoint read from ``source`` lacks keys or has some that are not used."""
    faults = [
        f"{len(keys)} {kind} keys ({_listed(sorted(keys))})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if faults:
        raise ValueError(f"{source} is not laid out as expected: {', '.join(faults)}")


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more
