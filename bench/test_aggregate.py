"""Aggregation of patches: ``spatial_aggregate`` against matrix products with all weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import agree, floor, operators, rivals, shapes
from bench.harness import Bench, Contender, Subject, compiled, ours
from bench.operators import Result
from bench.shapes import Case, Inputs

SHAPES = (*shapes.TOWERS, shapes.TINY_TOWER)


def close_features(x: Inputs, expected: Result, result: Result, dtype: torch.dtype) -> None:
    agree.close(expected[0], result[0], result[0].dtype)


AGGREGATE = Subject("spatial_aggregate", operators.spatial_aggregate, close_features, floor.aggregate_work)
CONTENDERS = [
    *ours(operators.spatial_aggregate),
    compiled(rivals.plain_aggregate),
    Contender("all weights", rivals.dense_aggregate),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
def test_spatial_aggregate(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, AGGREGATE, case, contender)
