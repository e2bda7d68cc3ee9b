"""Which text rows rate the visual tokens, for ``score="raters"``."""

from __future__ import annotations

from typing import Any

import torch

from ..state import Prompt
from ..strategies import raters
from ..strategies.rows import positions_first


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
    most_text = max(prompt.text_counts)
    if most_text == 0:
        return prompt.text_after
    text_rows = positions_first(prompt.text_after, most_text)

    def at(rows: torch.Tensor) -> torch.Tensor:
        source = rows.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[-1]).to(embeds.device)
        return embeds.gather(1, source)

    rates = raters(
        at(prompt.visual_index),
        (prompt.visual_index >= 0).to(embeds.device),
        at(text_rows),
        (text_rows >= 0).to(embeds.device),
    ).to(text_rows.device)
    length = prompt.visual.shape[1]
    rater_rows = torch.zeros(prompt.visual.shape[0], length + 1, dtype=torch.bool, device=text_rows.device)
    return rater_rows.scatter(1, torch.where(rates & (text_rows >= 0), text_rows, length), True)[:, :-1]
