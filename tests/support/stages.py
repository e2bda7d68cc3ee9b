"""A run that prunes in stages, held against the oracle: what each stage kept, and what is gone after it."""

from __future__ import annotations

import torch

import gap_triton
from gap_triton import GapConfig, Selection

from . import ways
from .comparison import TOLERANCE, error
from .embeds import embeds_of_prompt, with_embeds
from .oracle import NAME as ORACLE
from .oracle import MaskingOracle
from .tiny import IMAGE, VIDEO, generate


def stages_of(selection: Selection | None) -> list[Selection]:
    """What each stage kept, first to last."""
    found = []
    while selection is not None:
        found.append(selection)
        selection = selection.before
    return found[::-1]


def dropped_by(selection: Selection, visual: torch.Tensor) -> torch.Tensor:
    """[B, Q] bool, the visual rows that are gone after a stage."""
    stays = torch.zeros(visual.shape[0], visual.shape[1] + 1, dtype=torch.bool)
    stays.scatter_(1, torch.where(selection.index < 0, visual.shape[1], selection.index), True)
    return visual & ~stays[:, :-1]


def compare(
    name: str, inputs: dict[str, torch.Tensor], config: GapConfig, **options: object
) -> list[Selection]:
    """Generate pruned and by the oracle, which is told what was kept and the features of that, and nothing else."""
    model = ways.build(name, "gap_triton")
    gap_triton.configure(model, config)
    seen: list[torch.Tensor] = []
    handle = embeds_of_prompt(model, seen)
    pruned = generate(model, inputs, **options)
    handle.remove()
    stages = stages_of(gap_triton.last_selection(model))
    assert len(stages) == len(config.stages)

    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    gone = [dropped_by(selection, visual) for selection in stages]
    assert gone[-1].any()
    reference = ways.build(name, {"text_config": ORACLE})
    (first, *rest), (gone_first, *gone_later) = config.stages, gone
    later = [(stage.layer, dropped) for stage, dropped in zip(rest, gone_later, strict=True)]
    handle = with_embeds(reference, *seen)
    with MaskingOracle(reference, first.layer, 1.0, chosen=gone_first, then=later):
        expected = generate(reference, inputs, **options)
    handle.remove()
    assert torch.equal(pruned.sequences, expected.sequences)
    assert error(pruned, expected) <= TOLERANCE
    assert all(bool(step.isfinite().all()) for step in pruned.logits)
    return stages
