"""Selection by region: ``topk_per_region`` against the maximum of each region and ``torch.topk``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import agree, floor, operators, rivals, shapes
from bench.harness import Bench, Contender, Subject, compiled, ours
from bench.operators import Result
from bench.shapes import Case, Inputs

SHAPES = (*shapes.TOWERS, shapes.TINY_TOWER)


def same_scores(x: Inputs, expected: Result, result: Result, dtype: torch.dtype) -> None:
    agree.same_scores(expected[0], result[0], x.scores[:, -x.neighbours.shape[1] :])


REGION = Subject("topk_per_region", operators.topk_per_region, same_scores, floor.region_work)
CONTENDERS = [
    *ours(operators.topk_per_region),
    compiled(rivals.plain_regions),
    Contender("regions + torch.topk", rivals.regions_and_topk),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
def test_topk_per_region(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, REGION, case, contender)
