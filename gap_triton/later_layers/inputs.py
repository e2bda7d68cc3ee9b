"""Inputs of the layers after the pruning layer: mask, position ids and rotary embeddings of fewer tokens."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import ALL_CACHE_NAMES, cache_of
from ..introspect import WITHOUT_ATTENTION
from ..kv_cache.kept_tokens import KeptRows
from ..state import DecoderRun, Rows, Survivors
from .masks import causal_mask, column_positions, take_from_mask, with_reach_of

# Axis of the tokens, which follows the axis of the batch.
TOKEN_AXIS = {
    "position_ids": -1,  # [B, Q], or [A, B, Q] on several axes
    "position_embeddings": -2,  # each of cos and sin [B, Q, D], or [A, B, Q, D]
    "position_embeddings_global": -2,
    "position_embeddings_local": -2,
}
# Arguments that are made anew, or that hold nothing per token.
NOT_SHORTENED = ("attention_mask", "cache_position", *ALL_CACHE_NAMES)


def shorten(
    run: DecoderRun, kept: KeptRows, hidden_states: torch.Tensor, kwargs: dict[str, Any], index: int
) -> None:
    """Replace, in ``kwargs``, the arguments of layer ``index`` that depend on its tokens.

    Args:
        run: The run of the decoder.
        kept: What the layer holds after it.
        hidden_states: [B, L, C], the layer's input.
        kwargs: The layer's keyword arguments, changed in place.
        index: The layer's number in the decoder.
    """
    survivors, cache = run.survivors, cache_of(kwargs)
    cache_layer = None if cache is None or index >= len(cache.layers) else cache.layers[index]
    window = run.attachment.windows[index]
    mask = kwargs.get("attention_mask")
    if run.attachment.kinds[index] in WITHOUT_ATTENTION:
        kwargs["attention_mask"] = run.compute_once(
            ("padding", kept.layer), lambda: _later_padding(run.survivors, mask)
        )
    else:
        # Layers of one window and one stage share one mask of the model.
        kwargs["attention_mask"] = run.compute_once(
            ("mask", kept.layer, window),
            lambda: _later_mask(run, kept, mask, cache_layer, hidden_states, window),
        )
    if survivors is not None:
        for name, value in kwargs.items():
            if name not in NOT_SHORTENED:
                kwargs[name] = take_survivors(run.rows, survivors, name, value)
    ids = _new_ids(run, kept)
    if ids is not None:
        _renumber(run, kept, ids, hidden_states, kwargs)
    if kwargs.get("cache_position") is not None and cache_layer is not None:
        # Static caches of releases that have this argument write there: it must count from the layer's own length.
        dropped = 0 if run.kept_before is None else run.kept_before.dropped_at(index)
        kwargs["cache_position"] = kwargs["cache_position"][: hidden_states.shape[1]] - dropped


def _new_ids(run: DecoderRun, kept: KeptRows) -> torch.Tensor | None:
    """[B, L], or [A, B, L] on several axes: the renumbered ids of a layer's rows; None where they keep their query_rows."""
    if run.survivors is not None:
        return run.survivors.new_ids
    unpruned, shift = run.position_ids, kept.id_shift
    if unpruned is None or shift is None:
        return None
    return run.compute_once(("ids", kept.layer), lambda: shift_ids(unpruned, shift))


def _renumber(
    run: DecoderRun, kept: KeptRows, ids: torch.Tensor, hidden_states: torch.Tensor, kwargs: dict[str, Any]
) -> None:
    """Put ``ids``, and their rotary embeddings, in the place of those that the model gave."""
    # Where there are four axes, the first is for masks and goes to the layer, and the others are for RoPE.
    flat, axes = (ids, ids) if ids.dim() == 2 else (ids[0], ids[-3:])
    model_ids = kwargs.get("position_ids")
    kwargs["position_ids"] = axes if model_ids is not None and model_ids.dim() == 3 else flat
    if kwargs.get("position_embeddings") is not None:  # some layers have no rotary embedding
        kwargs["position_embeddings"] = run.compute_once(
            ("rotary", kept.layer), lambda: run.attachment.text.rotary_emb(hidden_states, axes)
        )


def shift_ids(position_ids: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return the ids of tokens that follow renumbered ones.

    Args:
        position_ids: [B or 1, Q] or [A, B or 1, Q] int64, the ids without pruning.
        shift: [B] or [A, B] int64, from `gap_triton.prefill.position_ids.compact`.
    """
    shift = shift.to(position_ids.device)[..., None]
    if position_ids.dim() == 3 and shift.shape[0] != position_ids.shape[0]:
        position_ids, shift = position_ids[-3:], shift[-3:]  # only one of them has the axis for masks
    return position_ids - shift


def take_survivors(rows: Rows, survivors: Survivors, name: str, value: Any) -> Any:
    """Return a layer's argument ``name`` for the surviving rows; shared by the layers that get the same object."""
    # Found by identity, and not by id(), which torch.compile can't carry over a graph break.
    for known, shortened in survivors.arguments:
        if known is value:
            return shortened
    if isinstance(value, (tuple, list)) and name.startswith("position_embeddings"):
        shortened = type(value)(take_survivors(rows, survivors, name, x) for x in value)
    elif not isinstance(value, torch.Tensor):
        return value
    elif name in TOKEN_AXIS:
        shortened = _take_rows(survivors, value, TOKEN_AXIS[name] % value.dim())
    elif value.dim() >= 2 and value.shape[0] in (1, rows.batch) and value.shape[1] == rows.queries:
        shortened = _take_rows(survivors, value, 1)  # one entry per token, whatever it is
    else:
        return value
    survivors.arguments.append((value, shortened))
    return shortened


def _take_rows(survivors: Survivors, value: torch.Tensor, axis: int) -> torch.Tensor:
    """``value`` with only the survivors on its token ``axis``, which follows the batch axis."""
    rows = survivors.sources.to(value.device)  # [B, L]
    shape = list(value.shape)
    shape[axis - 1] = rows.shape[0]
    value = value.expand(shape)
    rows = rows.view(*(rows.shape[i - axis + 1] if i in (axis - 1, axis) else 1 for i in range(value.dim())))
    shape[axis] = rows.shape[axis]
    return value.gather(axis, rows.expand(shape))


def _later_padding(survivors: Survivors | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of a layer that attends to nothing: [B, L], nonzero at real rows; None where there is no padding."""
    if survivors is None or (mask is None and survivors.dense):
        return mask
    real = survivors.index >= 0
    if mask is None:
        return real
    real = real.to(mask.device)
    return mask.expand(real.shape[0], -1).gather(1, survivors.sources.to(mask.device)) * real


def _later_mask(
    run: DecoderRun,
    kept: KeptRows,
    mask: torch.Tensor | None,
    cache_layer: Any | None,
    hidden_states: torch.Tensor,
    window: int | None,
) -> torch.Tensor | None:
    """Mask of a later layer; None where plain causal attention, or attention to everything, is right."""
    length, past = hidden_states.shape[1], run.rows.past
    static = cache_layer is not None and getattr(cache_layer, "is_compileable", False)
    if mask is None and kept.dense:
        if run.survivors is not None:
            return None
        if length == 1 and not static and (window is None or past + length <= window):
            return None
    return mask_by_position(run, kept, mask, cache_layer, length, hidden_states.device, window)


def mask_by_position(
    run: DecoderRun,
    kept: KeptRows,
    mask: torch.Tensor | None,
    cache_layer: Any | None,
    length: int,
    device: torch.device,
    window: int | None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return the mask [B, 1, L, N] of a layer that holds fewer columns than the model knows of, by original positions.

    Args:
        run: The run of the decoder.
        kept: What the layer holds after it.
        mask: The model's own mask of all rows and columns; None where it has none.
        cache_layer: The layer's cache before it takes the new rows; None without a cache.
        length: L, the number of rows.
        device: Where they are.
        window: Sliding window in original positions, None = unlimited.
        chunk: Number of original positions that make a chunk, None = no chunks.
    """
    past = run.rows.past
    columns = column_positions(kept, cache_layer, length)
    query_rows = rows_by_position(run, length, columns)
    if mask is not None and (run.rows.has_4d_mask or run.kept_before is None):
        return take_from_mask(mask, query_rows, columns, past + run.rows.queries)
    # The model sizes a mask by the first cache layer of its type. That layer may lack what was dropped earlier, and then
    # its mask is of no use here.
    starts = None if chunk is None else _first_real(run.rows, columns.device)
    positions = torch.where(query_rows < 0, -1, query_rows + past)
    allowed = causal_mask(positions, columns, window, chunk, starts)
    if run.rows.real is not None:
        real = run.rows.real.to(columns.device)
        real = real.gather(1, columns.clamp(min=0, max=real.shape[1] - 1))
        allowed = with_reach_of(allowed & real[:, None, None, :], allowed)
    return with_reach_of(allowed.to(device), allowed)


def rows_by_position(run: DecoderRun, length: int, columns: torch.Tensor) -> torch.Tensor:
    """Return where the ``length`` rows of a later layer stand among those of the forward, [B, L] int64, -1 = filler."""
    if run.survivors is not None:
        return run.survivors.index
    return torch.arange(length, device=columns.device).expand(columns.shape[0], -1)


def _first_real(rows: Rows, device: torch.device) -> torch.Tensor | None:
    """[B] int64, the number of padding tokens in front of each sample, where its first chunk begins; None = no padding."""
    if rows.real is None:
        return None
    return (rows.real.to(device).cumsum(dim=1) == 0).sum(dim=1)
