"""Row selection and gather in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..region.reference import candidates_first
from ..select import reference as select_reference
from .coverage import STRIDE_SHARE


def surviving_rows(
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
    share: int = STRIDE_SHARE.numerator,
    of_shares: int = STRIDE_SHARE.denominator,
) -> Tensor:
    """Return which rows of the prompt stay, see `gap_kernels.prune_by_score`.

    Args:
        scores: [B, V] float32.
        visual_index: [B, V] int64, -1 = filler.
        keep: Visual tokens to keep in every sample; unused where ``counts`` is given.
        counts: [B] int64 or None.
        attention_mask: [B, Q] bool or None.
        num_rows: Q.
        length: Columns of the result.
        coverage: How scores choose.
        neighbours: [B, V, M] or [1, V, M] int32, for ``"region"``.
        per_region: For ``"region"``; 0 = as many as are needed.
        order: [B, V] or [1, V] int64, for ``"stride"``.
        share: For ``"stride"``: so many in ``of_shares`` of the budget go by ``order``.
        of_shares: See there.

    Returns:
        [B, length] int64: the last ``length`` survivors, ascending, filled with -1 on the left.
    """
    batch, num_visual = visual_index.shape
    real = scores.new_ones((batch, num_rows), dtype=torch.bool) if attention_mask is None else attention_mask
    candidate = (visual_index >= 0) & real.gather(1, visual_index.clamp(min=0))

    # Slots in the order of their positions, so that ties go to the lower position; those that can't be chosen
    # go last with the lowest score there is, behind a candidate whose score is NaN.
    position, slot = torch.where(candidate, visual_index, num_rows).sort(dim=-1, stable=True)
    is_real = candidate.gather(1, slot)
    ranked = torch.where(is_real, scores.gather(1, slot), float("nan"))
    available = candidate.sum(-1)
    budget = available.clamp(max=keep) if counts is None else torch.minimum(available, counts)
    if coverage == "region":
        assert neighbours is not None
        others = _in_other_order(neighbours.expand(batch, -1, -1), slot)
        best = candidates_first(ranked, others, per_region, budget, is_real)
    elif coverage == "stride":
        assert order is not None
        by_order = order.expand(batch, -1).gather(1, slot)
        best = _sample_first(ranked, by_order, budget * share // of_shares, is_real)
    else:
        best = select_reference.best_first(ranked)
    chosen = select_reference.first_ascending(best, 0, budget, num_visual)  # [B, V] slots
    chosen = torch.where(chosen >= 0, position.gather(1, chosen.clamp(min=0)), num_rows)

    # Column `num_rows` takes the writes of what is no position of this sample.
    stays = F.pad(real, (0, 1))
    stays.scatter_(1, torch.where(visual_index >= 0, visual_index, num_rows), False)
    stays.scatter_(1, chosen, True)
    stays[:, num_rows - 1] = True
    rows = torch.arange(num_rows, device=scores.device)
    # Sorting moves the -1 of what doesn't stay to the left, where the filler belongs.
    index = torch.where(stays[:, :num_rows], rows, -1).sort(dim=-1).values
    return F.pad(index, (length - num_rows, 0), value=-1)  # a negative amount of padding cuts columns off


def _in_other_order(neighbours: Tensor, slot: Tensor) -> Tensor:
    """Return neighbours [B, V, M] of and by slots, of and by the places that ``slot`` [B, V] gives to these."""
    num_visual = slot.shape[1]
    neighbours = neighbours.gather(1, slot[:, :, None].expand_as(neighbours)).long()
    inside = (neighbours >= 0) & (neighbours < num_visual)
    place = slot.argsort(-1).gather(1, torch.where(inside, neighbours, 0).flatten(1)).view_as(neighbours)
    return torch.where(inside, place, -1)


def _sample_first(scores: Tensor, order: Tensor, sampled: Tensor, real: Tensor) -> Tensor:
    """Return the entries [B, V] of each sample, first ``sampled`` [B] by their order, then from the best to the worst."""
    spread = select_reference.best_first(torch.where(real & (order >= 0), -order.float(), float("nan")))
    in_sample = spread.argsort(-1) < sampled[:, None]
    place = select_reference.best_first(scores).argsort(-1)
    return torch.where(in_sample, place - place.shape[1], place).argsort(-1)


def gather_rows(
    hidden_states: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy the surviving rows; filler (-1) copies row 0.

    Args:
        hidden_states: [B, Q, C].
        cos: [B, Q, D'].
        sin: [B, Q, D'].
        position_ids: [B, Q] or [A, B, Q] int64.
        index: [B, L] int64, -1 = filler.

    Returns:
        ``(hidden_states, cos, sin, position_ids)``, each with L instead of Q, contiguous.
    """
    source = index.clamp(min=0)

    def gather(tensor: Tensor) -> Tensor:
        return tensor.gather(1, source[:, :, None].expand(-1, -1, tensor.shape[2]))

    ids = position_ids.gather(-1, source.expand(*position_ids.shape[:-1], -1))
    return gather(hidden_states), gather(cos), gather(sin), ids
