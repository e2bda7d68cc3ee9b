"""Vision towers: ``attention_received`` against the mean of the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import agree, floor, operators, rivals, shapes
from bench.harness import Bench, Contender, Subject, compiled, ours
from bench.operators import Result
from bench.shapes import Case, Inputs

SHAPES = (*shapes.TOWERS, shapes.TINY_TOWER)

COMPILED_TOKENS = 4096


def close_scores(x: Inputs, expected: Result, result: Result, dtype: torch.dtype) -> None:
    agree.close(expected[0], result[0], dtype)


RECEIVED = Subject("attention_received", operators.attention_received, close_scores, floor.received_work)
CONTENDERS = [
    *ours(operators.attention_received),
    compiled(rivals.plain_received, max_tokens=COMPILED_TOKENS),
    Contender("eager mean", rivals.eager_received, matrix=True),
    Contender("flash-colsum", rivals.column_means(), rounds=True, max_head_dim=64),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
def test_attention_received(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, RECEIVED, case, contender)
