"""What a configuration needs of the vision encoder, and the hooks that record it."""

from __future__ import annotations

import functools

from ..attachment import Attachment, encoder_of
from ..calls import current_config, current_sizes
from ..config import BEFORE_THE_DECODER, GapConfig, Stage, needs_grid
from ..state import ForwardState
from ..vision_tower import Need, Needs, Tower, TowerRecorder, check_needs, find_tower, install, record_sizes

MERGE_NEEDS: dict[str, Needs] = {
    "none": frozenset(),
    "aggregation": frozenset({"similarity", "features"}),
    "contextual": frozenset({"keys", "features"}),
    "nearest": frozenset({"keys", "features"}),
    "average": frozenset(),  # of tokens as the decoder gets them
    "cluster": frozenset(),  # likewise
}
FEATURE_COVERAGES = ("coverage_gain", "distinct")
EARLIER_SCORES: dict[tuple[str, str], Need] = {
    ("anchors", "cls"): "middle_cls",
    ("anchors", "received"): "middle_received",
    ("windows", "cls"): "early_cls",
    ("windows", "received"): "early_received",
}
"""By coverage and score, the same score in an earlier layer."""
TOWER_SCORES: tuple[Need, ...] = ("cls", "received", "key_norm")


def compares_entering(stage: Stage) -> bool:
    """Return whether tokens are compared as they enter the projector: where the encoder ranks. Else as the decoder has them.

    They may be recorded for a merge all the same.
    """
    return stage.coverage in FEATURE_COVERAGES and stage.score in TOWER_SCORES


def needs_of(config: GapConfig) -> Needs:
    """Return what must be recorded of the vision encoder for ``config``; empty where that is nothing."""
    stage: Stage = config.stages[0]
    return needs_of_stage(stage) if stage.layer == BEFORE_THE_DECODER else frozenset()


def needs_of_stage(stage: Stage) -> Needs:
    """Return what must be recorded of the vision encoder for a ``stage`` before the decoder."""
    of_score = frozenset(need for need in TOWER_SCORES if need == stage.score)
    of_coverage: Needs = frozenset({"features"}) if compares_entering(stage) else frozenset()
    if (stage.coverage, stage.score) in EARLIER_SCORES:
        of_coverage = frozenset({EARLIER_SCORES[stage.coverage, stage.score]})
    return of_score | of_coverage | MERGE_NEEDS[stage.merge]


def hook_tower(attachment: Attachment, config: GapConfig) -> None:
    """Install hooks on the vision encoder, if ``config`` needs any: once, and anew where it was replaced.

    Raises:
        ValueError: There is no vision encoder that could give it; the message has what can be done instead.
    """
    encoder, tower = encoder_of(attachment.owner), attachment.tower
    if tower is not None and (tower.owner is not encoder or not tower.is_current()):
        for handle in reversed(attachment.tower_handles):
            handle.remove()
        attachment.tower, attachment.tower_handles, attachment.records_sizes = None, [], False
    if any(needs_grid(stage) for stage in config.stages) and not attachment.records_sizes:
        attachment.records_sizes = True
        attachment.tower_handles += record_sizes(attachment.owner)
    attachment.projector_is_last = None  # the model may have been changed since
    attachment.layouts.clear()
    if not needs_of(config):
        return
    tower = attachment.tower or find_tower(encoder)
    check_needs(tower, _needs_from(tower, config))
    if attachment.tower is None:
        attachment.tower = tower
        needs = functools.partial(_current_needs, attachment)
        attachment.tower_handles += install(tower, needs, functools.partial(current_sizes, attachment))


def _current_needs(attachment: Attachment) -> Needs:
    config = current_config(attachment)
    if attachment.tower is None or config is None or attachment.owner.training:
        return frozenset()  # nothing is pruned then
    return _needs_from(attachment.tower, config)


def start_recorder(state: ForwardState) -> None:
    """Record the vision encoder until the recorder's `stop`, if the configuration needs something of it."""
    tower = state.attachment.tower
    needs = frozenset() if tower is None else _needs_from(tower, state.config)
    if tower is not None and needs:
        state.recorder = TowerRecorder(tower, needs)
        state.recorder.start(state.owner.kwargs)


def _needs_from(tower: Tower, config: GapConfig) -> Needs:
    """`needs_of`, without the input of the projector where there is none: then tokens merge as the decoder gets them."""
    needs = needs_of(config)
    return needs if tower.projector is not None else needs - {"features"}
