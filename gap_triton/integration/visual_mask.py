"""``visual_mask``: the caller names the visual tokens, for inputs in which nothing else does."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..introspect import visual_token_ids
from ..visual_prompt import VisualRows


def named_visual_tokens(
    owner: PreTrainedModel,
    mask: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    cache: Any | None,
    drafts: int,
    checked: bool,
) -> VisualRows | None:
    """Return the visual tokens that ``mask`` names, or None for a step of decoding.

    `generate` hands the mask of the prompt to every step; a decode step holds no image and ignores it, and so does one that
    verifies drafts.

    Args:
        owner: The module that receives the input.
        mask: [B, Q] bool on the device of the input, True at visual tokens; or [B, T] for all T tokens so far, those in
            ``cache`` included.
        input_ids: [B, Q], or None.
        inputs_embeds: [B, Q, C], or None.
        cache: The KV cache, None without one.
        drafts: How many of the last rows are drafts of assisted decoding, or written without a cache, which no mask covers.
        checked: `gap_triton.prepare` has compared it with ``input_ids``.

    Returns:
        The rows [B, Q].

    Raises:
        ValueError: ``mask`` is no bool tensor, or is of another shape or on another device; or ``input_ids`` hold image
            placeholders and ``mask`` names a row that is none.
    """
    inputs = input_ids if input_ids is not None else inputs_embeds
    if inputs is None or inputs.shape[1] - drafts <= 1:
        return None
    batch, queries = inputs.shape[0], inputs.shape[1] - drafts
    _refuse_no_mask(mask, inputs.device)
    if mask.shape != (batch, queries):
        # Layer 0 holds every token, but where tokens were dropped before it, and there another turn is refused.
        past = 0 if cache is None else int(cache.get_seq_length())
        if past == 0 or mask.shape != (batch, past + queries):
            whole = f", or {[batch, past + queries]} with the {past} tokens in the cache" if past else ""
            raise ValueError(
                f"visual_mask has shape {list(mask.shape)}: expected one entry per row of this forward, "
                f"{[batch, queries]}{whole}. Chunked prefill feeds other rows than the prompt's, and can't be combined "
                "with it"
            )
        mask = mask[:, past:]
    mask = torch.nn.functional.pad(mask, (0, drafts))
    if input_ids is not None and visual_token_ids(owner.config) and not checked:
        _refuse_other_rows(owner, mask, input_ids)
    return VisualRows(mask)


def _refuse_no_mask(mask: Any, device: torch.device) -> None:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        kind = f"a tensor of {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"visual_mask is {kind}: expected a bool tensor, True at visual tokens")
    if mask.device != device:
        raise ValueError(
            f"visual_mask is on {mask.device} and the input on {device}: expected the same device"
        )


def _refuse_other_rows(owner: PreTrainedModel, mask: torch.Tensor, input_ids: torch.Tensor) -> None:
    """Raise ValueError if ``mask`` [B, Q] names rows of ``input_ids`` [B, Q] that are no placeholder of an image."""
    placeholders = VisualRows(input_ids, tuple(visual_token_ids(owner.config)))
    strangers = (mask & ~placeholders.mask).nonzero().tolist()
    if strangers:
        raise ValueError(
            f"visual_mask names {len(strangers)} rows that hold no image placeholder in input_ids, the first at "
            f"{strangers[0]} (sample, row): expected a subset of the placeholders, or inputs_embeds without input_ids"
        )
