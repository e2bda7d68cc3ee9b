"""Selection: ``topk_indices`` against ``torch.topk`` and a sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import agree, floor, operators, rivals, shapes
from bench.harness import Bench, Contender, Subject, compiled, ours
from bench.operators import Result
from bench.shapes import Case, Inputs

SHAPES = (*shapes.DECODERS, shapes.TINY_DECODER)


def same_indices(x: Inputs, expected: Result, result: Result, dtype: torch.dtype) -> None:
    agree.same_choice(expected[0], result[0], x.scores, None)


SELECT = Subject("topk_indices", operators.topk_indices, same_indices, floor.topk_work)
CONTENDERS = [
    *ours(operators.topk_indices),
    compiled(rivals.plain_topk),
    Contender("torch.topk + sort", rivals.topk_and_sort),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
def test_topk_indices(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, SELECT, case, contender)
