"""Which text rows rate the visual tokens, for ``score="raters"`` and ``"raters_corrected"``."""

from __future__ import annotations

from typing import Any

import torch
from gap_kernels import text_raters

from ..state import Prompt


def find_raters(prompt: Prompt, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return [B, Q] bool, the text rows after the image that are relevant to it (SparseVLM, arXiv 2410.04417, section 3.2).

    Args:
        prompt: The prompt.
        kwargs: Keyword arguments of the decoder, with ``inputs_embeds`` [B, Q, C].

    Raises:
        ValueError: The decoder was given no ``inputs_embeds``.
    """
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        raise ValueError(
            "score='raters': the decoder was given input_ids, which hold no image to be relevant to; pass inputs_embeds, or "
            "use score='text'"
        )
    if not any(prompt.text_counts):
        return prompt.text_after
    device = embeds.device
    found = text_raters(embeds, prompt.visual_index.to(device), prompt.text_rows.to(device))
    return found.to(prompt.visual.device)
