"""Reading a prompt: which rows are visual, and which are padding."""

from __future__ import annotations

from typing import Any

import gap_kernels
import torch
from transformers import PreTrainedModel

from ..introspect import visual_token_ids
from ..later_layers.masks import is_plain, visible
from ..state import Prompt
from ..visual_prompt import PromptCounts, VisualRows

BLOCK = 1 << 20
"""How many entries of a mask are looked at, at once."""


def find_visual_rows(
    owner: PreTrainedModel, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> VisualRows | None:
    """Return where the visual tokens are, or None for a single-token input (a decode step holds no image).

    With ``inputs_embeds`` alone a row counts as visual if it equals the embedding of a placeholder token, which is
    how transformers finds the rows to fill.
    """
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or given.shape[1] == 1:
        return None  # before the config is asked for the placeholders, which takes long for a decode step
    placeholders = tuple(visual_token_ids(owner.config))
    if inputs_embeds is None or input_ids is not None:
        return VisualRows(given, placeholders)
    table = owner.get_input_embeddings()
    visual = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    for token in placeholders:
        placeholder = table(torch.full((), token, dtype=torch.long, device=inputs_embeds.device))
        visual |= (inputs_embeds == placeholder.to(inputs_embeds.dtype)).all(dim=-1)
    return VisualRows(visual)


def real_positions(mask: Any, past: int | torch.Tensor, queries: int, batch: int) -> torch.Tensor | None:
    """Return which tokens are real and which padding, read from whatever mask the model was given.

    Args:
        mask: None; [B, N] with nonzero at real tokens; or a ready-made mask of four dimensions, bool or additive.
        past: Number of tokens before the new rows; a tensor in a decode step on a static cache.
        queries: Q, number of new rows.
        batch: B.

    Returns:
        [B, past + Q] bool; None = no padding. Where ``past`` is a tensor, as wide as the mask and one column more.
    """
    if not isinstance(mask, torch.Tensor):
        return None
    if isinstance(past, torch.Tensor):
        real = mask if mask.dim() == 2 else mask[:, 0, -1]
        real = visible(real) if mask.dim() == 4 else real != 0
        return torch.nn.functional.pad(real, (0, 1), value=False).expand(batch, -1)
    total = past + queries
    if mask.dim() == 2:
        # A longer mask belongs to a static cache that is not full yet; a shorter one covers the end.
        real = mask[:, :total] != 0
        return torch.nn.functional.pad(real, (total - real.shape[1], 0), value=True)
    allowed = visible(mask).any(dim=1)  # by some head, [B, Q, K]
    first = max(total - mask.shape[-1], 0)  # the mask of a sliding layer covers the last K positions only
    allowed = allowed[..., : total - first]
    # A padded row is seen by no other row, and sees at most itself, where a mask must leave it something. An earlier column
    # that no row looks at is padding, or out of reach for good.
    is_real = allowed[..., past - first :].diagonal(dim1=1, dim2=2)
    if queries > 1:
        views_by_others = allowed.sum(dim=1)[:, past - first :] - is_real.long()  # by other rows
        is_real = (views_by_others > 0) | (is_real & (allowed.sum(dim=2) > 1))
    earlier = allowed[..., : past - first].any(dim=1)
    return torch.cat([earlier.new_ones(earlier.shape[0], first), earlier, is_real], dim=1).expand(batch, -1)


def position_ids_of(
    given: torch.Tensor | None, past: int | torch.Tensor, queries: int, device: torch.device
) -> torch.Tensor:
    """Return the position ids of a decoder's input, [B or 1, Q], or [A, B or 1, Q] on several axes.

    Args:
        given: The decoder's argument: None (it counts by itself), [Q], [B, Q], or [A, B, Q] for M-RoPE, some models
            with plain text ids in front.
        past: Number of tokens before the new rows; a tensor in a decode step on a static cache.
        queries: Q.
        device: Where the ids are to lie if they are made here.
    """
    if given is None:
        if isinstance(past, int):
            return torch.arange(past, past + queries, device=device)[None]
        return (past + torch.arange(queries, device=device))[None]
    return given[None] if given.dim() == 1 else given


def looks_ahead(mask: Any, real: torch.Tensor | None) -> bool:
    """Return whether a mask lets some row see a later one, as for images (Gemma 3) and prefixes (PaliGemma).

    One read, and none of a mask that is known to be only causal and padding.

    Args:
        mask: [B or 1, 1, Q, K], bool or additive; or a dict of those. Anything else does not look ahead.
        real: [B, Q] bool, False at padding; None = no padding.
    """
    if isinstance(mask, dict):
        return any(looks_ahead(each, real) for each in mask.values())
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or is_plain(mask, 1):
        return False
    columns = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    block = max(1, BLOCK // max(1, mask.shape[0] * mask.shape[1] * mask.shape[-1]))
    # The last column that each row sees; in blocks, as a number for each entry is several times the mask.
    last = torch.cat(
        [
            torch.where(visible(rows).any(dim=1), columns, -1).amax(dim=-1)
            for rows in mask.split(block, dim=2)
        ],
        dim=1,
    )
    # Where every row sees itself and nothing later, the last column seen moves on from row to row.
    moves_on = last[:, 1:] > last[:, :-1]
    if real is not None:
        real = real.to(mask.device)
        moves_on = moves_on | ~(real[:, 1:] & real[:, :-1])
    return not bool(moves_on.all())


def read_prompt(
    visual: VisualRows,
    attention_mask: torch.Tensor | None,
    answer: torch.Tensor | None = None,
    counts: PromptCounts | None = None,
) -> Prompt:
    """Find out what a prompt holds, in one launch, and with one read from the device where its counts are not known.

    Args:
        visual: Its visual tokens, [B, Q].
        attention_mask: [B, Q] of any dtype, nonzero at real tokens; None = no padding.
        answer: [B, Q] bool, rows of an answer and what follows it, which no visual token is among; None = none.
        counts: What it holds, where the host knows it.

    Raises:
        ValueError: On the CPU: ``counts`` are not those of the prompt.
    """
    mask = None if attention_mask is None else attention_mask.to(visual.tokens.device)
    known: dict[str, Any] = {}
    if counts is not None:
        known = {"num_visual": max(counts.visual), "num_text": max(1, *counts.text), "counts": counts}
    try:
        rows = gap_kernels.read_prompt(
            visual.tokens, visual.placeholders, attention_mask=mask, answer=answer, **known
        )
    except ValueError as error:
        if counts is None:
            raise
        raise ValueError(
            "visual_prompt was prepared for other tokens or other padding: call gap_triton.prepare on these inputs "
            f"({error})"
        ) from error
    if counts is None:
        counts = PromptCounts(*map(tuple, rows.counts.tolist()))
    return Prompt(rows, answer, counts)
