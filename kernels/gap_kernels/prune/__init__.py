"""Dropping visual tokens: score, select, and gather what stays with its own position ids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..importance.op import check_importance, visual_importance_op
from ..validation import ShapeChecker, check_length, read_max, split_count
from .coverage import Coverage, Covering, covering
from .op import check_rows, gather_rows_op, prune_tokens_op, surviving_rows_op

__all__ = ["PrunedTokens", "prune_by_score", "prune_tokens"]


class PrunedTokens(NamedTuple):
    """What is left of a prompt. A sample with fewer than L survivors has filler on the left."""

    hidden_states: Tensor
    """[B, L, C]; a filler row is a copy of the sample's row 0, to be masked by the caller."""
    cos: Tensor
    """[B, L, D'], like ``hidden_states``."""
    sin: Tensor
    """[B, L, D'], like ``hidden_states``."""
    position_ids: Tensor
    """int64 [B, L] or [A, B, L]: each survivor's own ids, unchanged (arXiv 2506.21873)."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """int64 [B, L]: the row that each survivor had before, ascending; -1 = filler."""
    scores: Tensor
    """float32 [B, V]: the score of each visual token, whether kept or not."""


def prune_by_score(
    scores: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    keep: int | Tensor,
    *,
    attention_mask: Tensor | None = None,
    length: int | None = None,
    coverage: Coverage = "topk",
    neighbours: Tensor | None = None,
    per_region: int | None = None,
    order: Tensor | None = None,
    spread: float | None = None,
) -> PrunedTokens:
    """Keep the best-scored visual tokens and all text, in order, every survivor with its own position ids.

    A sample's survivors are:

    - ``keep`` of its visual tokens, as ``coverage`` says; higher scores are better, NaN is worst, ties go to the lower
      position:

      - ``"topk"``: the best;
      - ``"region"``: the best of those that fewer than ``per_region`` of their neighbours beat; and if these are fewer
        than ``keep``, all of them and the best of the others (Nüwa, arXiv 2602.02951, see `topk_per_region`);
      - ``"stride"``: ``spread`` of ``keep``, rounded down, by ``order`` alone, then the best of the others (FEATHER,
        arXiv 2412.13180, which keeps a lattice of its own beside the best);

    - every row that is neither visual nor padding;
    - its last row, whatever it is, because the next token is predicted from it. A visual last row that isn't
      among the ``keep`` best is one survivor more.

    Args:
        scores: [B, V] float32, one score per slot of ``visual_index``.
        hidden_states: [B, Q, C] float32, float16, bfloat16 or float64.
        cos: [B, Q, D'], any of those dtypes; may be expanded over the batch.
        sin: Like ``cos``.
        position_ids: [B, Q] int64, or [A, B, Q] with any A (3 for M-RoPE); may be expanded over the batch.
        visual_index: [B, V] int64, positions of the visual tokens, distinct, in any order; -1 = filler,
            anywhere.
        keep: Visual tokens to keep, >= 0: an int, or an int64 tensor [B] with a count per sample. More than a
            sample has means all.
        attention_mask: [B, Q] bool, True = a real token. Padding is dropped and never chosen, even where
            ``visual_index`` names it.
        length: Rows of the result, L. Default: the largest number of survivors in the batch, which takes one
            read from the device; required under ``torch.compile``, ``torch.export`` and CUDA graph capture.
            More than needed means more filler.
        coverage: How scores choose: ``"topk"``, ``"region"`` or ``"stride"``.
        neighbours: For ``"region"``: [B, V, M] int32, or [1, V, M] for all samples alike, with M of 0..8: for each slot of
            ``visual_index`` the other slots of its region, distinct, in any order; -1 = none. See `grid_neighbours`.
            Neighbours that are filler or padding count as none.
        per_region: For ``"region"``: candidates of a region, >= 1. None: as many as ``keep`` needs of each region,
            ``ceil(keep / regions)``; neighbours must be mutual then.
        order: For ``"stride"``: [B, V] int64, or [1, V] for all samples alike: the rank of each slot in the uniform
            sample, compared as float32, the lowest first; negative = last.
        spread: For ``"stride"``: the share of the uniform sample in ``keep``, in 0..1, read as the decimal that it prints
            as, of nine digits at most. None: three tenths.

    Returns:
        The survivors. Gradients flow back through ``hidden_states``, ``cos`` and ``sin``.

    Raises:
        ValueError: If an argument has another shape, dtype or device, or a coverage lacks what it needs, or has what
            another needs. On the CPU also if a position or a neighbour is out of range or repeated, a count negative,
            or ``length`` less than a sample's survivors (elsewhere, where checking would need a read, the surplus on
            the left is lost).
    """
    shapes = ShapeChecker()
    check_rows(shapes, hidden_states, cos, sin, position_ids, visual_index)
    shapes.check("scores", scores, "B V", (torch.float32,))
    if attention_mask is not None:
        shapes.check("attention_mask", attention_mask, "B Q", (torch.bool,))
    cover = covering(shapes, coverage, neighbours, per_region, order, spread)
    return _prune(
        shapes, scores, hidden_states, cos, sin, position_ids, visual_index, keep, attention_mask, length, cover
    )  # fmt: skip


def prune_tokens(
    query: Tensor,
    key: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    keep: int | Tensor,
    *,
    rows: Tensor | None = None,
    attention_mask: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    length: int | None = None,
    coverage: Coverage = "topk",
    neighbours: Tensor | None = None,
    per_region: int | None = None,
    order: Tensor | None = None,
    spread: float | None = None,
) -> PrunedTokens:
    """Score visual tokens by attention and prune: `visual_importance`, then `prune_by_score`.

    One launch, where ``length`` is given, no gradient is wanted, the prompt has at most 8,192 rows
    (float32, or by stride: 4,096), and the GPU is NVIDIA's from sm_80 on; else several. Scores are those of
    ``visual_importance`` without its variants.

    Args:
        query: [B, Hq, Q, D], see `visual_importance`.
        key: [B, Hkv, S, D] with Q <= S.
        hidden_states: [B, Q, C], see `prune_by_score`, like the next arguments.
        cos: [B, Q, D'].
        sin: [B, Q, D'].
        position_ids: [B, Q] or [A, B, Q] int64.
        visual_index: [B, V] int64.
        keep: Int, or [B] int64.
        rows: [B, R] int64, the query rows to average, see `visual_importance`.
        attention_mask: [B, S] bool; its last Q columns belong to the rows.
        lse: [B, Hq, R] float32, see `visual_importance`.
        scale: Factor of ``q k^T``; default ``D ** -0.5``.
        length: Rows of the result, see `prune_by_score`, like the next arguments.
        coverage: ``"topk"``, ``"region"`` or ``"stride"``.
        neighbours: [B or 1, V, M] int32, for ``"region"``.
        per_region: Int, for ``"region"``.
        order: [B or 1, V] int64, for ``"stride"``.
        spread: Float in 0..1, for ``"stride"``. One launch is for the usual share alone.

    Returns:
        The survivors. Scores of float64 queries are rounded to float32 before the selection.

    Raises:
        ValueError: As the two functions do.
    """
    shapes = ShapeChecker()
    check_importance(shapes, query, key, visual_index, rows, attention_mask, lse, scale)
    check_rows(shapes, hidden_states, cos, sin, position_ids, visual_index)
    cover = covering(shapes, coverage, neighbours, per_region, order, spread)
    differentiable = (query, key, hidden_states, cos, sin)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if length is not None and not needs_gradient:
        check_length(length, at_least=1)
        count, counts = _kept_count(keep, shapes)
        return PrunedTokens(
            *prune_tokens_op(
                query, key, hidden_states, cos, sin, position_ids, visual_index, count, counts, rows,
                attention_mask, lse, scale, length, *cover,
            )
        )  # fmt: skip
    scores = visual_importance_op(query, key, visual_index, rows, attention_mask, lse, scale).float()
    if attention_mask is not None:
        attention_mask = attention_mask[:, key.shape[2] - query.shape[2] :]
    return _prune(
        shapes, scores, hidden_states, cos, sin, position_ids, visual_index, keep, attention_mask, length, cover
    )  # fmt: skip


def _kept_count(keep: int | Tensor, shapes: ShapeChecker) -> tuple[int, Tensor | None]:
    """Return ``split_count``, of which an int is at most the number of visual tokens."""
    count, counts = split_count("keep", keep, shapes)
    return min(count, shapes.sizes["V"]), counts


def _prune(
    shapes: ShapeChecker,
    scores: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    keep: int | Tensor,
    attention_mask: Tensor | None,
    length: int | None,
    cover: Covering,
) -> PrunedTokens:
    """Select and gather; all arguments but ``keep`` and ``length`` are checked already."""
    count, counts = _kept_count(keep, shapes)
    if length is not None:
        check_length(length, at_least=1)
    num_rows = hidden_states.shape[1]
    width = num_rows if length is None else length
    index = surviving_rows_op(scores, visual_index, count, counts, attention_mask, num_rows, width, *cover)
    if length is None:
        survivors = read_max((index >= 0).sum(-1), "the number of rows depends on what stays")
        index = index[:, num_rows - survivors :].contiguous()
    hidden_states, cos, sin, position_ids = gather_rows_op(hidden_states, cos, sin, position_ids, index)
    return PrunedTokens(hidden_states, cos, sin, position_ids, index, scores)
