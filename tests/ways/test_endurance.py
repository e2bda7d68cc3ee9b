"""Memory, tensors and hooks stay what they were: a short run of what `make endurance` does at length."""

from __future__ import annotations

import itertools

from scripts import endurance
from support.methods import NAMES
from support.ways import MODELS, build

ROUND = len(NAMES) * len(MODELS)
"""Generations in which each method has run once on each model: what is kept of it is kept from then on."""


def test_nothing_grows() -> None:
    models = [build(name) for name in MODELS]
    calls = endurance.run(models)
    rounds = []
    for _ in range(2):
        list(itertools.islice(calls, ROUND))
        rounds.append(endurance.held(models))
    assert not endurance.grown(*rounds)


def test_what_grows_is_noticed() -> None:
    model = build(MODELS[0])
    before = endurance.held([model])
    leaks = [model.register_forward_hook(lambda *_: None), model.lm_head.weight.clone()]
    problems = endurance.grown(before, endurance.held([model]))
    assert leaks
    assert [problem.split(" grew")[0] for problem in problems] == ["tensors", "hooks"]
