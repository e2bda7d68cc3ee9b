"""Which rows of a forward are answer, and no prompt: they stay, and rank nothing.

What ranks the visual tokens is the prompt, because nothing else exists when `generate` prunes it. A forward may hold
generated tokens after it all the same: targets of a loss, drafts to be verified, or, without a KV cache, what has been
written so far. Each of these becomes one mask here.
"""

from __future__ import annotations

from typing import Any

import torch

from ..host import to_device
from ..state import HeadArguments, Prompt
from ..visual_prompt import VisualRows

IGNORED_LABEL = -100
GENERATED = "gap_generated"  # how many tokens `generate` has generated, where it feeds them again


def head_arguments_of(kwargs: dict[str, Any]) -> HeadArguments:
    """Return what the keyword arguments of a forward hold about its rows; takes out the one that is ours."""
    logits = kwargs.get("logits_to_keep", 0)
    generated = kwargs.pop(GENERATED, 0)
    if isinstance(logits, torch.Tensor):
        drafts, logit_rows = generated, logits
    else:
        # Only assisted decoding asks for the logits of the last rows, one more than it has drafts.
        drafts, logit_rows = max(generated, logits - 1 if isinstance(logits, int) else 0), None
    ignored = kwargs.get("ignore_index", IGNORED_LABEL)
    return HeadArguments(
        drafts=drafts,
        generated=generated,
        logit_rows=logit_rows,
        labels=kwargs.get("labels"),
        ignored_label=ignored,
    )


def drafts_of(head: HeadArguments, visual: VisualRows) -> int:
    """Return how many last rows of ``visual`` [B, Q] are drafts: none where the caller wants the logits of the image."""
    drafts = head.drafts
    if not drafts or drafts >= visual.tokens.shape[1] or bool(visual.mask[:, -drafts:].any()):
        return 0
    return drafts


def follows_prompt(head: HeadArguments, visual: VisualRows | None, inputs: torch.Tensor) -> bool:
    """Return whether all rows but the first are answer: they go on, as decoding does, whether drafts or targets of a loss.

    One read where there are labels, or rows by a tensor; none in `generate`.

    Args:
        head: What the caller gave to the head.
        visual: The visual tokens; None = none.
        inputs: [B, Q] or [B, Q, C], the rows.
    """
    if inputs.shape[1] == head.drafts + 1:
        return True
    if visual is None:
        visual = VisualRows(torch.zeros(inputs.shape[:2], dtype=torch.bool, device=inputs.device))
    answer = answer_rows(head, 0, visual)
    return answer is not None and bool(answer[:, 1:].all())


def names_rows(head: HeadArguments, visual: VisualRows) -> bool:
    """Return whether labels, or rows whose logits are needed, name the rows of an answer: only the device knows which."""
    return head.logit_rows is not None or _labels_of(head, visual.tokens) is not None


def answer_rows(head: HeadArguments, drafts: int, visual: VisualRows) -> torch.Tensor | None:
    """Return [B, Q] bool, the rows of each sample's answer and whatever follows it; None where no argument names any.

    Args:
        head: What the caller gave to the head.
        drafts: How many last rows of all samples are drafts.
        visual: The visual tokens, [B, Q].
    """
    batch, queries = visual.tokens.shape
    if not names_rows(head, visual):
        if not drafts:
            return None
        return (torch.arange(queries, device=visual.tokens.device) >= queries - drafts).expand(batch, -1)
    mask, labels = visual.mask, _labels_of(head, visual.tokens)
    positions = torch.arange(queries, device=mask.device)
    last_visual = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)  # [B, 1]
    start = torch.full_like(last_visual, queries - drafts)
    if head.logit_rows is not None:
        first = _first_logit_row(head.logit_rows.to(mask.device), batch, queries)
        start = torch.where(first >= last_visual, start.minimum(first + 1), start)
    if labels is not None:
        targets = (labels != head.ignored_label) & (positions > last_visual)
        start = start.minimum(torch.where(targets, positions, queries).amin(dim=1, keepdim=True))
    return positions >= start


def _labels_of(head: HeadArguments, tokens: torch.Tensor) -> torch.Tensor | None:
    labels = head.labels
    return labels.to(tokens.device) if labels is not None and labels.shape == tokens.shape else None


def _first_logit_row(rows: torch.Tensor, batch: int, queries: int) -> torch.Tensor:
    """[B, 1] int64, the first row that a tensor as ``logits_to_keep`` names; Q - 1 where it names none."""
    if rows.dtype == torch.bool:
        positions = torch.arange(queries, device=rows.device)
        first = torch.where(rows, positions, queries - 1).amin(dim=-1, keepdim=True)
    elif rows.shape[-1] == 0:
        first = torch.full((1,), queries - 1, device=rows.device)
    else:
        first = rows.remainder(queries).amin(dim=-1, keepdim=True)
    return first.expand(batch, 1)


def refuse_lost_labels(head: HeadArguments, prompt: Prompt, keep: tuple[int, ...]) -> None:
    """Refuse labels whose prediction is lost, whatever token survives. One read, where there are labels.

    Args:
        head: What the caller gave to the head.
        prompt: The prompt.
        keep: How many visual tokens of each sample survive.

    Raises:
        ValueError: A label is to be predicted from padding, or from a visual token that may be dropped. The visual token
            right before an answer is the last row of the prompt, which stays.
    """
    labels = _labels_of(head, prompt.visual)
    if labels is None:
        return
    drops = [kept < count for kept, count in zip(keep, prompt.visual_counts, strict=True)]
    has_no_logits = prompt.visual & to_device(drops, prompt.visual.device)[:, None]
    if prompt.before_answer is not None:
        has_no_logits = has_no_logits & ~prompt.before_answer
    has_no_logits = (has_no_logits | ~prompt.real)[:, :-1] & (labels[:, 1:] != head.ignored_label)
    if bool(has_no_logits.any()):
        sample, row = has_no_logits.nonzero()[0].tolist()
        raise ValueError(
            f"labels[{sample}, {row + 1}] is to be predicted from row {row}, which is padding or a visual token that may "
            f"be dropped, and then has no logits: set it to {head.ignored_label}, as all labels of padding, visual tokens "
            "and what comes right after them, but for the answer's first token"
        )
