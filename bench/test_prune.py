"""Pruning: ``prune_tokens`` against its parts in PyTorch and against FastV's way."""

from __future__ import annotations

from typing import Any

import pytest

from bench import agree, floor, operators, rivals, shapes
from bench.harness import Bench, Contender, Subject, compiled, ours
from bench.shapes import Case

SHAPES = (*shapes.DECODERS, shapes.TINY_DECODER)

PRUNE = Subject("prune_tokens", operators.prune_tokens, agree.same_pruning, floor.prune_work)
CONTENDERS = [
    *ours(operators.prune_tokens),
    compiled(rivals.plain_prune),
    Contender("fastv", rivals.fastv_prune, matrix=True),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
def test_prune_tokens(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, PRUNE, case, contender)
