"""``gap_kernels::prune_tokens`` and the two operators it can be made of: registration, gradient and checks.

``prune_tokens`` is one launch where that is possible and not too large to be fast. ``surviving_rows`` and ``gather_rows``
are for scores that come from elsewhere, for a number of rows that must be found first, and for a gather whose gradient is
wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import use_triton
from ..importance.op import visual_importance_op
from ..library import fake, gradient, operator
from ..region.op import check_neighbour_values
from ..validation import FLOAT_DTYPES, ShapeChecker, check_distinct, check_range, describe
from . import reference
from .coverage import STRIDE_SHARE

if TYPE_CHECKING:
    from .one_launch import Plan


@operator("surviving_rows")
def surviving_rows_op(
    scores: Tensor,
    visual_index: Tensor,
    keep: int,
    counts: Tensor | None,
    attention_mask: Tensor | None,
    num_rows: int,
    length: int,
    coverage: str = "topk",
    neighbours: Tensor | None = None,
    per_region: int = 0,
    order: Tensor | None = None,
    share: int = 3,
    of_shares: int = 10,
) -> Tensor:
    """Return the last ``length`` surviving rows of each sample, [B, length] int64; see ``reference.py``."""
    if scores.is_cpu:
        _check_values(visual_index, counts, num_rows, neighbours)
    # On the CPU the result is made wide enough for every row first, so that a lack of columns can be seen.
    width = max(length, num_rows) if scores.is_cpu else length
    given = (
        scores, visual_index, keep, counts, attention_mask, num_rows, width, coverage, neighbours, per_region, order,
        share, of_shares,
    )  # fmt: skip
    if use_triton(scores):
        from . import kernel

        index = kernel.surviving_rows(*given)
    else:
        index = reference.surviving_rows(*given)
    if scores.is_cpu:
        _check_wide_enough(index, length)
    return index[:, width - length :].contiguous()


@fake("surviving_rows")
def _(visual_index: Tensor, length: int) -> Tensor:
    return visual_index.new_empty((visual_index.shape[0], length))


@operator("gather_rows")
def gather_rows_op(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy the rows ``index`` names; see ``reference.py``."""
    if use_triton(index):
        from . import kernel

        return kernel.gather_rows(hidden_states, cos, sin, position_ids, index)
    return reference.gather_rows(hidden_states, cos, sin, position_ids, index)


@fake("gather_rows")
def _(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_rows(hidden_states, cos, sin, position_ids, index.shape[1])


def _empty_rows(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = hidden_states.shape[0]
    return (
        hidden_states.new_empty((batch, length, hidden_states.shape[2])),
        cos.new_empty((batch, length, cos.shape[2])),
        sin.new_empty((batch, length, sin.shape[2])),
        position_ids.new_empty((*position_ids.shape[:-1], length)),
    )


def _save_gather(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_rows = inputs[0].shape[1]
    ctx.save_for_backward(inputs[4])


def _gather_backward(
    ctx: Any, grad_hidden: Tensor, grad_cos: Tensor, grad_sin: Tensor, grad_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """Send each copy's gradient back to its source row, so that a pruned model can be trained."""
    (index,) = ctx.saved_tensors
    source = index.clamp(min=0)[:, :, None]

    def scatter(grad: Tensor) -> Tensor:
        rows = grad.new_zeros((grad.shape[0], ctx.num_rows, grad.shape[2]))
        return rows.scatter_add(1, source.expand(-1, -1, grad.shape[2]), grad)

    return scatter(grad_hidden), scatter(grad_cos), scatter(grad_sin), None, None


gradient("gather_rows", _gather_backward, _save_gather)


@operator("prune_tokens")
def prune_tokens_op(
    query: Tensor,
    key: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    keep: int,
    counts: Tensor | None,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    length: int,
    coverage: str = "topk",
    neighbours: Tensor | None = None,
    per_region: int = 0,
    order: Tensor | None = None,
    share: int = 3,
    of_shares: int = 10,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Score, select and gather without a gradient: the fields of ``PrunedTokens``, in one launch where possible."""
    given = (
        query, key, hidden_states, cos, sin, position_ids, visual_index, keep, counts, rows, attention_mask, lse, scale,
        length, coverage, neighbours, per_region, order,
    )  # fmt: skip
    work = None
    if (share, of_shares) == STRIDE_SHARE.as_integer_ratio():  # which is a constant of the one launch
        work = _plan_of_one_launch(
            query, key, hidden_states, cos, position_ids, visual_index, rows, lse, length, coverage
        )
    if work is None:
        return prune_in_several_launches(*given, share, of_shares)
    from . import one_launch

    num_query = query.shape[2]
    if query.is_cpu:
        _check_values(visual_index, counts, num_query, neighbours)
        if rows is not None:
            check_range("rows", rows, -1, num_query - 1)
    result = one_launch.prune_tokens(*given, work=work)
    if query.is_cpu:
        mask = _mask_of_rows(attention_mask, key, num_query)
        every = reference.surviving_rows(
            result[5], visual_index, keep, counts, mask, num_query, num_query, coverage, neighbours, per_region, order
        )  # fmt: skip
        _check_wide_enough(every, length)
    return result


def _plan_of_one_launch(
    query: Tensor,
    key: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    rows: Tensor | None,
    lse: Tensor | None,
    length: int,
    coverage: str,
) -> Plan | None:
    """Return how one launch does it; None if it can't, or if several are a better choice, which give the same."""
    if query.dtype == torch.float64 or not use_triton(query):
        return None
    from . import one_launch

    if not one_launch.applies(query, length, coverage):
        return None
    work = one_launch.plan_of(query, key, hidden_states, cos, position_ids, visual_index, rows, lse, length)
    return work if one_launch.is_likely_faster(work.programs, query.device) else None


def prune_in_several_launches(
    query: Tensor,
    key: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    keep: int,
    counts: Tensor | None,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    length: int,
    coverage: str = "topk",
    neighbours: Tensor | None = None,
    per_region: int = 0,
    order: Tensor | None = None,
    share: int = 3,
    of_shares: int = 10,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do the same by the operators that ``prune_tokens`` can be made of, whatever their path."""
    num_query = query.shape[2]
    mask = _mask_of_rows(attention_mask, key, num_query)
    scores = visual_importance_op(query, key, visual_index, rows, attention_mask, lse, scale).float()
    index = surviving_rows_op(
        scores, visual_index, keep, counts, mask, num_query, length, coverage, neighbours, per_region, order,
        share, of_shares,
    )  # fmt: skip
    return *gather_rows_op(hidden_states, cos, sin, position_ids, index), index, scores


def _mask_of_rows(attention_mask: Tensor | None, key: Tensor, num_query: int) -> Tensor | None:
    """Return the mask of the prompt's own rows, which are the last of the keys."""
    return None if attention_mask is None else attention_mask[:, key.shape[2] - num_query :]


@fake("prune_tokens")
def _(
    query: Tensor,
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    index = visual_index.new_empty((visual_index.shape[0], length))
    scores = query.new_empty(visual_index.shape, dtype=torch.float32)
    return *_empty_rows(hidden_states, cos, sin, position_ids, length), index, scores


def check_rows(
    shapes: ShapeChecker,
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    visual_index: Tensor,
) -> None:
    """Check the tensors whose rows are gathered and record their sizes in ``shapes``.

    Raises:
        ValueError: If one has another shape, dtype or device than documented.
    """
    shapes.check("hidden_states", hidden_states, "B Q C", FLOAT_DTYPES)
    if hidden_states.shape[1] == 0:
        raise ValueError(f"hidden_states: expected at least one row, got {describe(hidden_states)}")
    shapes.check("cos", cos, "B Q D'", FLOAT_DTYPES)
    shapes.check("sin", sin, "B Q D'", (cos.dtype,))
    three = isinstance(position_ids, Tensor) and position_ids.dim() == 3
    shapes.check("position_ids", position_ids, "A B Q" if three else "B Q", (torch.int64,))
    shapes.check("visual_index", visual_index, "B V", (torch.int64,))


def _check_values(
    visual_index: Tensor, counts: Tensor | None, num_rows: int, neighbours: Tensor | None
) -> None:
    """Check what can only be checked by reading, on the CPU."""
    check_range("visual_index", visual_index, -1, num_rows - 1)
    check_distinct("visual_index", visual_index, num_rows)
    if neighbours is not None:
        check_neighbour_values(neighbours, visual_index.shape[1])
    if counts is not None and bool((counts < 0).any()):
        raise ValueError(f"keep: expected counts >= 0, got {int(counts.min())}")


def _check_wide_enough(index: Tensor, length: int) -> None:
    """Check that ``length`` columns hold what stays; ``index`` has columns enough."""
    needed = int((index >= 0).sum(-1).max()) if index.numel() else 0
    if length < needed:
        raise ValueError(
            f"length: expected at least {needed}, the most rows that stay in a sample, got {length}"
        )
