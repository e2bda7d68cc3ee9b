"""Reading a prompt: which rows are visual, which are padding, and how many of each survive."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .config import GapConfig
from .state import Plan

TOKEN_ID_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def visual_token_ids(config: Any) -> list[int]:
    """Ids of the placeholder tokens that stand for visual features in ``config``'s vocabulary."""
    ids = {getattr(config, name, None) for name in TOKEN_ID_FIELDS}
    return sorted(i for i in ids if isinstance(i, int))


def find_visual_tokens(
    owner: PreTrainedModel, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor | None:
    """[B, Q] bool mask of the visual tokens, or None for a single-token input (a decode step holds no image).

    With ``inputs_embeds`` alone a row counts as visual if it equals the embedding of a placeholder token, which is
    how transformers finds the rows to fill.
    """
    if input_ids is not None:
        if input_ids.shape[1] == 1:
            return None
        visual = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in visual_token_ids(owner.config):
            visual |= input_ids == token
        return visual
    if inputs_embeds is None or inputs_embeds.shape[1] == 1:
        return None
    table = owner.get_input_embeddings()
    visual = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    for token in visual_token_ids(owner.config):
        placeholder = table(torch.full((), token, dtype=torch.long, device=inputs_embeds.device))
        visual |= (inputs_embeds == placeholder.to(inputs_embeds.dtype)).all(dim=-1)
    return visual


def real_positions(mask: Any, past: int, queries: int, batch: int, first_type: str) -> torch.Tensor | None:
    """Which tokens are real and which padding, read from whatever mask the model was given.

    Args:
        mask: None; [B, N] with nonzero at real tokens; a ready-made mask of four dimensions, bool or additive; or a dict
            of those by layer type.
        past: Number of tokens before the new rows.
        queries: Q, number of new rows.
        batch: B.
        first_type: Type of the decoder's first layer, whose mask is sized by a cache that nothing was dropped from.

    Returns:
        [B, past + Q] bool; None = no padding.
    """
    if isinstance(mask, dict):
        mask = mask.get(first_type, next(iter(mask.values())))
    if not isinstance(mask, torch.Tensor):
        return None
    total = past + queries
    if mask.dim() == 2:
        # A longer mask belongs to a static cache that is not full yet; a shorter one speaks of the end.
        real = mask[:, :total] != 0
        return torch.nn.functional.pad(real, (total - real.shape[1], 0), value=True)
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # [B, Q, K]
    first = max(total - mask.shape[-1], 0)  # the mask of a sliding layer covers the last K positions only
    allowed = allowed[..., : total - first]
    # A padded row may not attend to itself. An earlier column that no row looks at is padding, or out of reach for good.
    own = allowed[..., past - first :].diagonal(dim1=1, dim2=2)
    earlier = allowed[..., : past - first].any(dim=1)
    return torch.cat([earlier.new_ones(earlier.shape[0], first), earlier, own], dim=1).expand(batch, -1)


def position_ids_of(
    given: torch.Tensor | None, past: int, queries: int, device: torch.device
) -> torch.Tensor:
    """The position ids of a decoder's input, [B or 1, Q], or [A, B or 1, Q] where it is handed several per token.

    Args:
        given: What the decoder was handed: None (it counts by itself), [Q], [B, Q], or [A, B, Q] for M-RoPE, some models
            with plain text ids in front.
        past: Number of tokens before the new rows.
        queries: Q.
        device: Where the ids are to lie if they are made here.
    """
    if given is None:
        return (past + torch.arange(queries, device=device))[None]
    return given[None] if given.dim() == 1 else given


def looks_ahead(mask: Any, real: torch.Tensor | None) -> bool:
    """Whether a mask lets some row see a later one, as masks for images (Gemma 3) and prefixes (PaliGemma) do. One read.

    Args:
        mask: [B or 1, 1, Q, K], bool or additive; or a dict of those. Anything else does not look ahead.
        real: [B, Q] bool, False at padding; None = no padding.
    """
    if isinstance(mask, dict):
        return any(looks_ahead(each, real) for each in mask.values())
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return False
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    # Where every row sees itself and nothing later, the last column seen moves on from row to row.
    last = torch.where(allowed, torch.arange(mask.shape[-1], device=mask.device), -1).amax(dim=-1)
    moves_on = last[:, 1:] > last[:, :-1]
    if real is not None:
        real = real.to(mask.device)
        moves_on = moves_on | ~(real[:, 1:] & real[:, :-1])
    return not bool(moves_on.all())


def make_plan(visual: torch.Tensor, real: torch.Tensor | None, config: GapConfig) -> Plan | None:
    """Decide what a prefill drops, with one read from the device.

    Args:
        visual: [B, Q] bool.
        real: [B, Q] bool, False at padding; None = no padding.
        config: What to keep.

    Returns:
        The plan, or None where nothing is to be dropped.
    """
    queries = visual.shape[1]
    positions = torch.arange(queries, device=visual.device)
    if real is None:
        real = torch.ones_like(visual)
    real = real.to(visual.device)
    visual = visual & real
    last_visual = torch.where(visual, positions, -1).amax(dim=1, keepdim=True)  # [B, 1]
    text_after = real & ~visual & (positions > last_visual)  # [B, Q]
    facts = torch.stack(
        [visual.sum(1), real.sum(1), text_after.sum(1), visual[:, -1].long(), real[:, -1].long()], dim=1
    ).tolist()

    keep, lengths, dense, most_visual, most_text = [], [], True, 0, 0
    for visual_count, real_count, text_count, last_is_visual, last_is_real in facts:
        kept = config.count(visual_count)
        # The last row always stays, because generation reads its logits: one more row where it is padding, or where it
        # is a visual token that was not chosen.
        extra = int(not last_is_real) or int(last_is_visual and kept < visual_count)
        keep.append(kept)
        lengths.append(real_count - visual_count + kept + extra)
        dense = dense and not extra
        most_visual, most_text = max(most_visual, visual_count), max(most_text, text_count)
    if all(kept == fact[0] for kept, fact in zip(keep, facts, strict=True)):
        return None

    length = max(lengths)
    return Plan(
        visual=visual,
        real=real,
        visual_index=_positions_first(visual, most_visual),
        keep=torch.tensor(keep, device=visual.device),
        rows=_scoring_rows(real, text_after, most_text, config),
        length=length,
        dense=dense and min(lengths) == length,
        padded=any(real_count < queries for _, real_count, *_ in facts),
    )


def _scoring_rows(
    real: torch.Tensor, text_after: torch.Tensor, most_text: int, config: GapConfig
) -> torch.Tensor:
    positions = torch.arange(real.shape[1], device=real.device)
    last_real = torch.where(real, positions, 0).amax(dim=1, keepdim=True)  # [B, 1]
    if config.score != "text" or most_text == 0:
        return last_real
    rows = _positions_first(text_after, most_text)  # [B, R]
    # A prompt that ends in its image has no text row after it; its last row ranks the tokens.
    rows[:, :1] = torch.where(rows[:, :1] < 0, last_real, rows[:, :1])
    return rows


def _positions_first(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Positions of the True entries of each row, ascending, then -1: [B, N] bool -> [B, width] int64."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    ordered = torch.where(mask, positions, mask.shape[1]).sort(dim=1).values[:, :width]
    return torch.where(ordered < mask.shape[1], ordered, -1)
