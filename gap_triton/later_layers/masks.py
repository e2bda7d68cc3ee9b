"""Attention masks of the layers after the pruning layer, rebuilt from original positions.

The model builds one mask for all layers, as if nothing were dropped. The later layers hold fewer columns. In the prefill
that drops, their mask is the model's own without the dropped rows and columns, so its structure stays. In every later
step it is built from the original positions of the columns that the layers hold.
"""

from __future__ import annotations

import inspect
import math
from types import FunctionType
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from ..kv_cache.kept_tokens import KeptRows

HIDDEN = -1e4
"""Additive masks hide a column by this value or less. A larger one is a bias: the column only weighs less or more."""

REACH = "_gap_reach"
"""Attribute of a plain mask, one that is only causal and padding: how many columns back a row attends."""

# transformers 5.x passes a length, 4.57 a tensor of that length.
_SIZES_BY_LENGTH = "query_length" in inspect.signature(CacheLayerMixin.get_mask_sizes).parameters


def mask_for_attention(**kwargs: Any) -> torch.Tensor | None:
    """Return transformers' mask for sdpa, marked if it is plain, so that nothing need be read from the device later.

    Whatever else a model puts into its mask (image tokens that see each other, prefixes, packed sequences) is in the
    function that makes it.
    """
    mask = sdpa_mask(**kwargs)
    if mask is None or mask.shape[2] == 1 or torch.compiler.is_compiling():
        return mask  # nothing ranks in a decode step
    parts = _parts_of(kwargs.get("mask_function", causal_mask_function))
    reach = math.inf if parts == _CAUSAL else kwargs.get("local_size") if parts == _SLIDING else None
    return _with_reach(mask, reach)


def _parts_of(function: Any) -> Any:
    """The code of a mask function and of the functions that it combines, without their numbers."""
    if isinstance(function, (tuple, list)):
        return tuple(map(_parts_of, function))
    if not isinstance(function, FunctionType):
        return type(function)
    return function.__code__, *(_parts_of(cell.cell_contents) for cell in function.__closure__ or ())


_CAUSAL = _parts_of(causal_mask_function)
_SLIDING = _parts_of(sliding_window_causal_mask_function(1))


def is_plain(mask: torch.Tensor | None, length: int) -> bool:
    """Return whether a mask is known on the host to be only causal and padding, for ``length`` tokens."""
    return mask is None or getattr(mask, REACH, 0) >= length


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Return which columns are seen, by a bool or by an additive mask: bool, of the shape of ``mask``."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def column_positions(kept: KeptRows, cache_layer: Any | None, queries: int) -> torch.Tensor:
    """Return the original position of each key column of one later layer's attention.

    Args:
        kept: What the later layers hold, ``queries`` new rows included if ``kept.index`` covers them.
        cache_layer: The layer's cache before it takes the new rows; None without a cache.
        queries: Number of new rows.

    Returns:
        [B, K] int64; -1 = a column that no row may attend to.
    """
    length_kept = kept.index.shape[1]
    if cache_layer is None:
        length, offset = queries, 0
    else:
        request = queries if _SIZES_BY_LENGTH else torch.arange(queries, device=kept.index.device)
        length, offset = cache_layer.get_mask_sizes(request)
    column = offset + torch.arange(length, device=kept.index.device)  # in the layer's own, shorter sequence
    covered = kept.index[:, column.clamp(max=length_kept - 1)]
    return torch.where(column < length_kept, covered, kept.covered + column - length_kept)


def take_from_mask(
    mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, total: int | torch.Tensor
) -> torch.Tensor:
    """Return the model's own mask with only the surviving rows and columns.

    Args:
        mask: [B or 1, 1, Q, K], bool (True = attend) or additive float.
        rows: [B, L] int64 surviving query rows, -1 = filler.
        columns: [B, N] int64 original positions of the columns that the layer holds, -1 = masked.
        total: Number of original positions up to the end of this forward; a tensor where the mask covers a whole static
            buffer.

    Returns:
        [B, 1, L, N], of the dtype of ``mask``.
    """
    # A sliding layer's mask covers the last K positions only; a static cache's covers its whole buffer.
    first = max(total - mask.shape[-1], 0) if isinstance(total, int) else 0
    model_mask = mask
    rows, columns = rows.to(mask.device), columns.to(mask.device)
    batch = rows.shape[0]
    inside = ((columns >= first) & (columns < first + mask.shape[-1]))[:, None, None, :]
    source = (columns - first).clamp(min=0, max=mask.shape[-1] - 1)
    mask = mask.expand(batch, *mask.shape[1:])
    by_row = mask.gather(
        2, rows.clamp(min=0)[:, None, :, None].expand(batch, mask.shape[1], -1, mask.shape[3])
    )
    mask = by_row.gather(3, source[:, None, None, :].expand(batch, mask.shape[1], rows.shape[1], -1))
    # No token stands in a filler row. It attends to everything: some back ends fail on a row without a column.
    filler = (rows < 0)[:, None, :, None]
    if mask.dtype == torch.bool:
        mask = (mask | filler) & inside
    else:
        mask = mask.masked_fill(filler, 0.0).masked_fill(~inside, torch.finfo(mask.dtype).min)
    return with_reach_of(mask, model_mask)


def causal_mask(
    query_positions: torch.Tensor,
    columns: torch.Tensor,
    window: int | None,
    chunk: int | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [B, 1, L, N] bool causal mask between original positions.

    Args:
        query_positions: [B or 1, L] int64, -1 = filler.
        columns: [B, N] int64, -1 = masked.
        window: Sliding window in original positions, None = unlimited.
        chunk: Number of original positions that make a chunk, outside of which a row sees nothing; None = no chunks.
        starts: [B] int64, where the first chunk of each sample begins; None = at 0.
    """
    columns = columns[:, None, None, :]
    query_positions = query_positions[:, None, :, None]
    allowed = columns <= query_positions
    if window is not None:
        allowed = allowed & (columns > query_positions - window)
    if chunk is not None:
        start = 0 if starts is None else starts[:, None, None, None]
        allowed = allowed & ((columns - start) // chunk == (query_positions - start) // chunk)
    # No token stands in a filler row. It attends to everything: some back ends fail on a row without a column.
    reach = window or chunk or math.inf
    return _with_reach((allowed | (query_positions < 0)) & (columns >= 0), reach)


def with_reach_of(mask: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``mask``, marked as plain if ``other`` is, of which it is a part or a copy with more padding hidden."""
    return _with_reach(mask, getattr(other, REACH, None))


def _with_reach(mask: torch.Tensor, reach: float | None) -> torch.Tensor:
    if reach is not None and not torch.compiler.is_compiling():
        setattr(mask, REACH, reach)
    return mask
