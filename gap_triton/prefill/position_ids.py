"""Which position ids the survivors carry: GAP's rule, the two defects that its paper (arXiv 2506.21873) names, and one more.

All but the first are here so that their effect can be measured.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..config import Ids
from ..later_layers.inputs import shift_ids
from ..state import Plan, Prompt
from ..strategies.rows import take_values


class KeptIds:
    """``ids="kept"``: gathering position ids together with the rows keeps them, so there is nothing to do."""

    def refuse(self, text: Any) -> None:
        """Raise ValueError where the rule is not defined for the decoder ``text``."""

    def order(self, index: torch.Tensor, plan: Plan, scores: torch.Tensor) -> torch.Tensor:
        """Return the rows ``index`` [B, L] in the order in which the later layers hold them.

        Args:
            index: [B, L] int64, rows of the prompt, ascending, -1 = filler.
            plan: What was dropped.
            scores: [B, V] float32, the scores of ``plan.visual_index``.
        """
        return index

    def number(
        self,
        position_ids: torch.Tensor,
        index: torch.Tensor,
        prompt: Prompt,
        earlier_shift: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return new ids of the survivors, and by how much those of later tokens are lowered; None where they keep theirs.

        Args:
            position_ids: [B, Q] or [A, B, Q], the ids without pruning.
            index: [B, L] int64, rows of the prompt, ascending, -1 = filler.
            prompt: The prompt.
            earlier_shift: [B] or [A, B] int64, by how much an earlier prompt on the same cache lowered the ids; None = 0.
        """
        return None


class CompactedIds(KeptIds):
    """``ids="compacted"``: 0, 1, 2, ..."""

    name: Ids = "compacted"

    def refuse(self, text: Any) -> None:
        """Raise ValueError where there is not one rotary embedding for all layers."""
        rotary = getattr(text, "rotary_emb", None)
        several = hasattr(text, "rotary_emb_local") or (
            rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
        )
        if rotary is None or several:
            raise ValueError(
                f"GapConfig.ids={self.name!r}: renumbering is defined for one rotary embedding for all layers, and "
                f"{type(text).__name__} has {'one by layer type' if several else 'none'}; use ids='kept'"
            )

    def number(
        self,
        position_ids: torch.Tensor,
        index: torch.Tensor,
        prompt: Prompt,
        earlier_shift: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return ids without gaps; an answer is numbered as tokens of later steps are."""
        query_rows = prompt.query_rows.to(index.device)
        ids, shift = compact(position_ids, index, query_rows, earlier_shift)
        if prompt.query_rows is not prompt.real:
            following = take_values(shift_ids(position_ids, shift), index)
            is_answer = (prompt.real.to(index.device) & ~query_rows).gather(1, index.clamp(min=0))
            ids = torch.where(is_answer, following, ids)
        return ids, shift


class InScoreOrder(KeptIds):
    """A rule that puts the visual survivors into score order. For one stage only, which finds all rows."""

    def order(self, index: torch.Tensor, plan: Plan, scores: torch.Tensor) -> torch.Tensor:
        """Put the visual rows best first, in the places that they hold among the others."""
        return score_order(index, plan.visual, plan.visual_index, scores)


class PermutedIds(InScoreOrder, CompactedIds):
    """``ids="permuted"``: 0, 1, 2, ..., with the visual survivors in score order."""

    name: Ids = "permuted"


class SameValues(CompactedIds):
    """A rule that changes ids of visual survivors alone: text keeps its own, also in later steps."""

    def number(
        self,
        position_ids: torch.Tensor,
        index: torch.Tensor,
        prompt: Prompt,
        earlier_shift: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the ids, and a shift of 0 for what follows."""
        ids = self.of_survivors(position_ids.long(), index, prompt)
        return ids, ids.new_zeros(ids.shape[:-1])

    def of_survivors(self, position_ids: torch.Tensor, index: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Return the ids [B, L] or [A, B, L] of the rows ``index`` [B, L]; arguments as those of `number`."""
        return take_values(position_ids, index)


class ReorderedIds(InScoreOrder, SameValues):
    """``ids="reordered"``: the ids that the survivors have together, ascending, with the visual ones in score order."""

    name: Ids = "reordered"


class StretchedIds(SameValues):
    """``ids="stretched"``: those of each run of visual tokens moved apart until the last one has the id of the run's end."""

    name: Ids = "stretched"

    def of_survivors(self, position_ids: torch.Tensor, index: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Return the ids, stretched on every axis."""
        visual = prompt.visual.to(index.device) & prompt.real.to(index.device)
        return stretch(position_ids, index, visual)


ID_RULES: dict[Ids, KeptIds] = {
    "kept": KeptIds(),
    "compacted": CompactedIds(),
    "permuted": PermutedIds(),
    "reordered": ReorderedIds(),
    "stretched": StretchedIds(),
}


def stretch(position_ids: torch.Tensor, index: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Move the ids of the visual survivors of each run of visual tokens apart, in proportion, to the end of the run.

    ``ceil(i (e - s) / m) + s``: a survivor's distance ``i`` from the first id ``s`` of its run, the largest such distance
    ``m`` among the survivors, and the last id ``e`` of the run; on several axes, on each by itself (RPME, Algorithm 3 of
    Nüwa, arXiv 2602.02951, which has one image and one axis).

    Args:
        position_ids: [B, Q] or [A, B, Q] int64, the ids without pruning.
        index: [B, L] int64 surviving rows, ascending, -1 = filler.
        visual: [B, Q] bool.

    Returns:
        [B, L] or [A, B, L] int64.
    """
    axes = position_ids.shape[:-1]
    begins = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    run = torch.where(visual, begins.cumsum(dim=1), 0)  # 0 = text
    largest = torch.iinfo(torch.int64).max
    number = visual.shape[1] + 1

    def of_runs(ids: torch.Tensor, runs: torch.Tensor, least: bool) -> torch.Tensor:
        empty = ids.new_full((*axes, number), largest if least else -largest)
        return empty.scatter_reduce(-1, runs.expand_as(ids), ids, "amin" if least else "amax")

    start, end = (of_runs(position_ids, run, least) for least in (True, False))
    rows = index.clamp(min=0)
    own_run = torch.where(index < 0, 0, run.gather(1, rows))
    ids = take_values(position_ids, index)
    most = of_runs(ids, own_run, False)
    start, end, most = (values.gather(-1, own_run.expand_as(ids)) for values in (start, end, most))
    extent = (most - start).clamp(min=1)
    stretched = start - (-(ids - start) * (end - start)).div(extent, rounding_mode="floor")
    return torch.where(own_run > 0, stretched, ids)


def score_order(
    index: torch.Tensor, visual: torch.Tensor, visual_index: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """Put the surviving visual rows in score order where visual rows were, as ``topk`` without a sort would.

    Args:
        index: [B, L] int64 surviving rows, ascending, -1 = filler.
        visual: [B, Q] bool.
        visual_index: [B, V] int64, the visual rows, -1 = filler.
        scores: [B, V] float32, their scores.

    Returns:
        [B, L] int64: ``index`` with its visual entries permuted, best first; ties and NaN by position.
    """
    rows = index.clamp(min=0)
    is_visual = (index >= 0) & visual.gather(1, rows)
    # One more row at the end takes the scores of filler.
    by_row = scores.new_zeros(visual.shape[0], visual.shape[1] + 1)
    by_row = by_row.scatter(1, torch.where(visual_index < 0, visual.shape[1], visual_index), scores)
    score = by_row.gather(1, rows).nan_to_num(nan=-torch.inf)
    # Text rows get one common score, so that the stable sorts below leave them in order.
    by_score = torch.where(is_visual, score, 0.0).argsort(dim=1, descending=True, stable=True)
    visual_first = (~is_visual.gather(1, by_score)).to(torch.int8).argsort(dim=1, stable=True)
    source = by_score.gather(1, visual_first)
    targets = (~is_visual).to(torch.int8).argsort(dim=1, stable=True)
    return torch.empty_like(index).scatter(1, targets, index.gather(1, source))


def compact(
    position_ids: torch.Tensor, index: torch.Tensor, real: torch.Tensor, earlier_shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the surviving rows without gaps; where a model has several axes, on every axis, as a text is numbered.

    Args:
        position_ids: [B, Q] or [A, B, Q] int64, the ids without pruning.
        index: [B, L] int64 surviving rows, ascending, -1 = filler.
        real: [B, Q] bool, False at padding.
        earlier_shift: [B] or [A, B] int64, by how much an earlier prompt on the same cache lowered the ids; None = 0.

    Returns:
        The new ids [B, L] or [A, B, L], and by how much ids of later tokens must be lowered, [B] or [A, B].
    """
    rows = index.clamp(min=0)
    counts = (index >= 0) & real.gather(1, rows)

    def at(row: torch.Tensor) -> torch.Tensor:
        return position_ids.gather(-1, row.expand(*position_ids.shape[:-1], -1))

    first = at(real.to(torch.int8).argmax(dim=1, keepdim=True))  # [B, 1]
    if earlier_shift is not None:
        first = first - earlier_shift[..., None]
    ids = (first + counts.cumsum(dim=1) - 1).clamp(min=0)
    number = torch.arange(index.shape[1], device=index.device)
    last = torch.where(counts, number, 0).amax(dim=1, keepdim=True)
    shift = at(rows.gather(1, last)) - ids.gather(-1, last.expand(*ids.shape[:-1], -1))
    return ids, shift[..., 0]
