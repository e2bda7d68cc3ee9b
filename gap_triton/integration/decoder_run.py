"""Beginning a run of the decoder: reading its rows, and deciding what every stage drops."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..arguments import cache_of
from ..attachment import Attachment
from ..calls import is_assistant
from ..config import BEFORE_THE_DECODER, needs_grid
from ..introspect import WHOLE, layer_type
from ..kv_cache.kept_tokens import (
    KeptTokens,
    dynamic_length,
    is_static,
    length_in_step,
    make_fixed_columns,
    mark_unfinished,
    original_length,
    refuse_continuation,
)
from ..later_layers.deepstack import take_out
from ..later_layers.outputs import refuse_router_logits
from ..prefill.answers import answer_rows, drafts_of, follows_prompt, names_rows, refuse_lost_labels
from ..prefill.grid_positions import grid_positions_of
from ..prefill.plan import decide, keeps_of
from ..prefill.position_ids import ID_RULES
from ..prefill.prompt import looks_ahead, position_ids_of, read_prompt, real_positions
from ..prefill.raters import find_raters
from ..state import DecoderRun, DecodeStep, Drop, ForwardState, Prefill, Prompt, Rows
from ..vision.select import select_before_decoder
from ..visual_prompt import VisualRows
from .supported_models import check_layers
from .unpruned import warn_no_placeholder

Kwargs = dict[str, Any]


def step_of(
    state: ForwardState, text: PreTrainedModel, inputs: torch.Tensor, kept: KeptTokens, kwargs: Kwargs
) -> DecodeStep | None:
    """Return the decode step of one row on a cache that lacks tokens; None where it is not so simple.

    It is simple where every layer attends to everything, and ids are those without pruning: later layers can take their mask
    from the one that the model makes for its first layer.

    Args:
        state: The running forward.
        text: The decoder.
        inputs: [B, 1] or [B, 1, C], the row.
        kept: What its layers hold.
        kwargs: Keyword arguments of the decoder.
    """
    cache = cache_of(kwargs)
    begin_run = functools.partial(run_of_step, state, text, inputs, kept, kwargs)
    if kept.plain_steps:
        return DecodeStep(kept, cache, dynamic_length(cache, kept) + 1, False, begin_run)
    if not takes_masks_only(kept, state.attachment):
        return None
    if not is_static(cache, kept.stages[0].first_later):
        if not torch.compiler.is_compiling():
            kept.plain_steps = kept.dense
        return DecodeStep(kept, cache, dynamic_length(cache, kept) + 1, not kept.dense, begin_run)
    if kept.columns is None or kept.columns.width is None:
        if torch.compiler.is_compiling():
            return None
        make_fixed_columns(cache, kept)
    return DecodeStep(kept, cache, None, True, begin_run)


def takes_masks_only(kept: KeptTokens, attachment: Attachment) -> bool:
    """Return whether later layers need nothing but masks in a decode step: all attend to everything, with ids as they are."""
    return not (kept.renumbered or attachment.survivors_only or any(attachment.windows))


def length_before(step: DecodeStep, layer: int) -> int | torch.Tensor:
    """Return how many tokens were there before ``step``, as ``layer`` knows it, which has not run yet."""
    if step.tokens is not None:
        return step.tokens - 1
    length: int | torch.Tensor = step.cache.layers[layer].get_seq_length() + step.kept.dropped_at(layer)
    return length


def run_of_step(
    state: ForwardState,
    text: PreTrainedModel,
    inputs: torch.Tensor,
    kept: KeptTokens,
    kwargs: Kwargs,
    past: int | torch.Tensor | None = None,
) -> DecoderRun:
    """Return the run of a decode step, of one row, on a cache that lacks tokens.

    Args:
        state: The running forward.
        text: The decoder.
        inputs: [B, 1] or [B, 1, C], the row.
        kept: What its layers hold.
        kwargs: Keyword arguments of the decoder.
        past: Number of original positions in the cache before it; None: as the cache says before its first layer runs.
    """
    if past is None:
        past = length_in_step(cache_of(kwargs), kept, kwargs.get("cache_position"))
    run = DecoderRun(state.config, state.attachment, _rows_of(state, text, inputs, past, kept), kept, kept)
    run.survivors_only = hands_survivors(state.attachment, kept.layers)
    _count_without_pruning(run, kept, kwargs, inputs.device)
    return run


def hands_survivors(attachment: Attachment, layers: tuple[int, ...]) -> bool:
    """Return whether a decoder from which tokens are dropped at ``layers`` is handed the survivors alone.

    Where more are dropped behind one of its layers, all of its layers are handed shortened inputs.
    """
    return attachment.survivors_only and layers == (BEFORE_THE_DECODER,)


def run_of_prompt(
    state: ForwardState, text: PreTrainedModel, inputs: torch.Tensor, kept: KeptTokens | None, kwargs: Kwargs
) -> tuple[DecoderRun | None, Kwargs]:
    """Return the run of several rows: a prompt, another turn, or drafts. What every stage drops is decided here.

    Args:
        state: The running forward.
        text: The decoder.
        inputs: [B, Q] or [B, Q, C], the rows.
        kept: What its layers hold; None where nothing has been dropped.
        kwargs: Keyword arguments of the decoder.

    Returns:
        The run, None where nothing is or was dropped; and the keyword arguments, with merged tokens put in.

    Raises:
        ValueError: The rows can't be pruned as configured, or can't follow what the cache holds.
    """
    past = original_length(cache_of(kwargs), kept, kwargs.get("cache_position"))
    visual = state.owner.visual
    run = DecoderRun(state.config, state.attachment, _rows_of(state, text, inputs, past, kept), kept, kept)
    verifies = past > 0 and follows_prompt(state.head, visual, inputs)
    has_image = False
    # A configuration that changes nothing plans nothing; only a cache that lacks tokens must know of another image.
    plans = kept is not None or not state.config.changes_nothing
    if visual is not None and plans and not verifies:
        prompt, drafts = _read(state, run.rows, visual, past)
        has_image = any(prompt.visual_counts)
        if has_image:
            kwargs = _plan(state, run, prompt, drafts, past, kwargs)
        elif state.owner.by_embedding:
            warn_no_placeholder(state.attachment.owner)
    if kept is not None:
        _count_without_pruning(run, kept, kwargs, inputs.device)
    if run.prefill is not None:
        ID_RULES[state.config.ids].refuse(text)
        refuse_router_logits(run, kwargs)
        kwargs = take_out(run, kwargs)
    layers = tuple(stage.layer for stage in state.config.stages)
    if run.prefill is None and kept is not None:
        layers = kept.layers
    run.survivors_only = hands_survivors(state.attachment, layers)
    if kept is not None and not verifies:
        _refuse_another_turn(run, kept, has_image, kwargs)
    return (None if run.prefill is None and kept is None else run), kwargs


def begin_to_fill(run: DecoderRun, cache: Any | None) -> None:
    """Record in the cache that the rows of ``run`` follow what it holds; mark it where several rows may fail half-way."""
    if run.kept_before is not None:
        run.kept_before.complete = True
    if cache is not None and run.rows.queries > 1:
        run.cache = cache
        mark_unfinished(cache)


def _rows_of(
    state: ForwardState,
    text: PreTrainedModel,
    inputs: torch.Tensor,
    past: int | torch.Tensor,
    kept: KeptTokens | None,
) -> Rows:
    """The rows ``inputs``, [B, Q] or [B, Q, C], after ``past`` others, of which the layers hold what was ``kept``."""
    # Padding is read from the caller's mask: by now some models have made another one from it.
    mask, (batch, queries) = state.owner.attention_mask, inputs.shape[:2]
    has_4d_mask = isinstance(mask, torch.Tensor) and mask.dim() == 4
    if isinstance(mask, dict):
        mask = _mask_that_tells_padding(mask, text, kept)

    def real() -> torch.Tensor | None:
        return real_positions(mask, past, queries, batch)

    return Rows(batch, queries, past, has_4d_mask, real)


def _mask_that_tells_padding(masks: dict[str, Any], text: PreTrainedModel, kept: KeptTokens | None) -> Any:
    """That of the first layer, if nothing was dropped from it; else one without a window, sized as if nothing were."""
    if kept is None or kept.stages[0].layer != BEFORE_THE_DECODER:
        return masks.get(layer_type(text.config, 0), next(iter(masks.values())))
    return next((masks[kind] for kind in WHOLE if masks.get(kind) is not None), None)


def _count_without_pruning(run: DecoderRun, kept: KeptTokens, kwargs: Kwargs, device: torch.device) -> None:
    """Keep the ids without pruning in ``run``, where its rows follow renumbered ones."""
    if kept.renumbered:
        rows = run.rows
        run.position_ids = position_ids_of(kwargs.get("position_ids"), rows.past, rows.queries, device)


def _refuse_another_turn(run: DecoderRun, kept: KeptTokens, has_image: bool, kwargs: Kwargs) -> None:
    """Raise ValueError if several more rows of a prompt can't follow what was ``kept``."""
    if is_assistant():
        # An assistant's prompt was complete. If all its drafts were wrong they are cropped, and it goes on with several
        # tokens: its own last one and what the other model wrote.
        kept.complete = True
    rows = run.rows
    refuse_continuation(kept, None if run.prefill is None else run.config, rows.queries, has_image)
    if not rows.has_4d_mask and looks_ahead(kwargs.get("attention_mask"), _real_rows(rows)):
        raise ValueError(
            "attention_mask: this model lets prompt tokens see later ones, which a pruned cache can't take in another "
            "turn: start a new cache with the whole conversation"
        )


def _real_rows(rows: Rows) -> torch.Tensor | None:
    """[B, Q] bool, False where one of the rows is padding; None = no padding."""
    return None if rows.real is None else rows.real[:, -rows.queries :]


def _read(state: ForwardState, rows: Rows, visual: VisualRows, past: int) -> tuple[Prompt, int]:
    """The prompt among ``rows``, whose visual tokens are ``visual``, and how many last rows are drafts."""
    head, prepared, counts = state.head, state.owner.prepared, None
    if prepared is None or names_rows(head, visual):
        drafts = drafts_of(head, visual)
    else:
        counts, drafts = prepared.counts_of(rows.batch, rows.queries, past, head.drafts)
    mask = _mask_of(state.owner.attention_mask, rows, past)
    prompt = read_prompt(visual, mask, answer_rows(head, drafts, visual), counts)
    if past == 0:
        rows.memo["real"] = prompt.real if prompt.padded else None
    return prompt, drafts


def _mask_of(mask: Any, rows: Rows, past: int) -> torch.Tensor | None:
    """[B, Q], nonzero where one of the rows is real; None = no padding. The caller's ``mask`` itself where it has that."""
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        mask = mask[:, : past + rows.queries]
        if mask.shape[1] >= rows.queries:
            return mask[:, -rows.queries :].expand(rows.batch, -1)
    return _real_rows(rows)


def _plan(
    state: ForwardState, run: DecoderRun, prompt: Prompt, drafts: int, past: int, kwargs: Kwargs
) -> Kwargs:
    """Decide what every stage drops; returns the decoder's keyword arguments, with merged tokens put in."""
    stages = state.config.stages
    if state.config.changes_nothing:
        return kwargs
    selection = None
    if stages[0].layer == BEFORE_THE_DECODER:
        selection, kwargs = select_before_decoder(state, prompt, stages[0], kwargs)
    drops = decide(prompt, stages, selection, renumbers=state.config.ids != "kept")
    if not drops:
        return kwargs
    check_layers(state.config, len(run.attachment.text.layers))
    refuse_lost_labels(state.head, prompt, drops[-1].keep)
    given, device = kwargs.get("position_ids"), prompt.visual.device
    ids = None if given is None else position_ids_of(given, past, run.rows.queries, device)
    drops = _with_what_ranks(state, prompt, drops, kwargs)
    run.prefill = Prefill(prompt, drops, drafts, past, ids, keeps_of(drops, device))
    return kwargs


def _with_what_ranks(
    state: ForwardState, prompt: Prompt, drops: tuple[Drop, ...], kwargs: Kwargs
) -> tuple[Drop, ...]:
    """``drops``, with the text rows and the positions in the image that the stages in the decoder need."""
    in_decoder = [drop.stage for drop in drops if drop.selection is None]
    rankers = {"text": prompt.text_after}
    if any(stage.score in ("raters", "raters_corrected") for stage in in_decoder):
        rankers["raters"] = rankers["raters_corrected"] = find_raters(prompt, kwargs)
    positions = None
    if any(map(needs_grid, in_decoder)):
        positions = grid_positions_of(state.attachment, state.owner.kwargs, prompt)
    return tuple(
        drop
        if drop.selection is not None
        else replace(
            drop,
            rankers=rankers.get(drop.stage.score),
            grid_positions=positions if needs_grid(drop.stage) else None,
        )
        for drop in drops
    )
