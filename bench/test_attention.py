"""Attention: with and without importance, against PyTorch's and flash-attn's, which return neither score nor lse."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bench import agree, floor, operators, rivals, shapes
from bench.harness import Bench, Contender, Subject, compiled, ours
from bench.operators import Result
from bench.shapes import Case, Inputs

SHAPES = (*shapes.DECODERS, shapes.TINY_DECODER)

COMPILED_TOKENS = 4096


def close_outputs(x: Inputs, expected: Result, result: Result, dtype: torch.dtype) -> None:
    """The output is rounded to the model's dtype; log-sum-exp and importance are not."""
    agree.close(expected[0], result[0], x.query.dtype)
    for theirs, exact in zip(result[1:], expected[1:], strict=False):
        agree.close(exact, theirs, torch.float32)


PLAIN = Subject("attention", operators.attention, close_outputs, floor.attention_work)
SCORING = Subject(
    "attention, importance",
    operators.attention_importance,
    close_outputs,
    functools.partial(floor.attention_work, importance=True),
)
CONTENDERS = [
    *ours(operators.attention),
    compiled(rivals.plain_attention, max_tokens=COMPILED_TOKENS),
    Contender("sdpa", rivals.sdpa),
    Contender("flash-attn", rivals.flash_attention()),
]
SCORING_CONTENDERS = [
    *ours(operators.attention_importance),
    *ours(operators.attention, suffix=" without"),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
def test_attention(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, PLAIN, case, contender)


@pytest.mark.parametrize("contender", SCORING_CONTENDERS, ids=str)
def test_attention_with_importance(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, SCORING, case, contender)
