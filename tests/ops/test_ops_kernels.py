"""The Triton kernels without a GPU: results in the interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

from pathlib import Path

import gap_kernels
import pytest
import torch
from gap_kernels import backend, topk_indices
from gap_kernels.backends import use_triton
from packaging.version import Version
from support.processes import run_pytest


def test_results_in_the_interpreter(tmp_path: Path) -> None:
    numpy, triton = pytest.importorskip("numpy"), pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 can't loop to a scalar with numpy 2.4 or later")
    operators = (
        "prompt",
        "raters",
        "merge",
        "cosine",
        "scatter",
        "rotation",
        "select",
        "region",
        "windows",
        "importance",
        "corrected",
        "prune",
        "attention",
        "received",
        "aggregate",
        "greedy",
        "similarity",
    )
    files = [*(f"ops/test_ops_{name}.py" for name in operators), "support/kernels_checks.py"]
    run_pytest(
        ["-p", "support.kernels_interpreter", *files],
        TRITON_INTERPRET="1",
        HYPOTHESIS_STORAGE_DIRECTORY=str(tmp_path),
    )


@pytest.mark.gpu
def test_results_on_a_gpu() -> None:
    run_pytest(["support/kernels_checks.py"], TRITON_INTERPRET="0")


def test_backend_names() -> None:
    with (
        pytest.raises(ValueError, match="backend: expected one of auto, triton, reference, got 'cuda'"),
        backend("cuda"),
    ):
        pass
    assert gap_kernels.backend is backend


def test_triton_on_the_cpu_needs_the_interpreter() -> None:
    pytest.importorskip("triton")
    scores = torch.zeros(1, 3)
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="on cpu needs the interpreter, so set TRITON_INTERPRET=1"),
    ):
        topk_indices(scores, 1)
    assert topk_indices(scores, 1).tolist() == [[0]]


def test_backends_nest() -> None:
    scores = torch.zeros(1)
    assert not use_triton(scores)
    with backend("triton"), backend("reference"):
        assert not use_triton(scores)
        with backend("auto"):
            assert not use_triton(scores)
