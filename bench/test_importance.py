"""Scoring: ``visual_importance`` of the last row, of all text rows, and with the log-sum-exp given."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bench import agree, floor, operators, rivals, shapes
from bench.floor import Work
from bench.harness import Bench, Contender, Subject, compiled, ours
from bench.operators import Result
from bench.shapes import Case, Inputs

SHAPES = (*shapes.DECODERS, shapes.TINY_DECODER)


def close_scores(x: Inputs, expected: Result, result: Result, dtype: torch.dtype) -> None:
    agree.close(expected[0], result[0], dtype)


def text_work(case: Case, dtype: torch.dtype) -> Work:
    return floor.importance_work(case, dtype, rows=case.shape.text)


LAST = Subject(
    "visual_importance",
    operators.visual_importance,
    close_scores,
    functools.partial(floor.importance_work, rows=1),
)
TEXT = Subject("visual_importance, text rows", operators.visual_importance_text, close_scores, text_work)
GIVEN = Subject(
    "visual_importance, lse",
    operators.visual_importance_lse,
    close_scores,
    functools.partial(floor.importance_work, rows=1, lse=True),
)


@pytest.mark.parametrize(
    "contender", [*ours(operators.visual_importance), compiled(rivals.plain_importance)], ids=str
)
def test_last_row(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, LAST, case, contender)


@pytest.mark.parametrize(
    "contender", [*ours(operators.visual_importance_text), compiled(rivals.plain_importance_text)], ids=str
)
def test_text_rows(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, TEXT, case, contender)


@pytest.mark.parametrize("contender", ours(operators.visual_importance_lse), ids=str)
def test_given_lse(benchmark: Any, bench: Bench, case: Case, contender: Contender) -> None:
    bench.measure(benchmark, GIVEN, case, contender)
