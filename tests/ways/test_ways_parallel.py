"""Tensor parallelism in two real processes, and placing a model with accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.comparison import TOLERANCE, error
from support.tiny import generate
from support.ways import CONFIG, MODELS, build, make, pair

import gap_triton
from gap_triton.prefill import parallel

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_keep_the_same_tokens(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate for tp_plan")
    build(name).save_pretrained(tmp_path)
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("--module", "support.tensor_parallel_worker", str(tmp_path), name),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    # Not by the exit status: on a busy machine, gloo may abort a process that has passed while it shuts down.
    assert {path.name for path in tmp_path.glob("passed-*")} == {"passed-0", "passed-1"}, run.stderr[-4000:]


def test_heads_are_missing_and_nobody_says_where_they_are() -> None:
    attachment = SimpleNamespace(
        text=SimpleNamespace(config=SimpleNamespace(num_attention_heads=8)),
        modules=lambda: [torch.nn.Module()],
    )
    assert parallel.tensor_parallel_group(attachment, torch.zeros(1, 8, 2, 4)) is None
    with pytest.raises(ValueError, match=r"holds 4 of 8 attention heads, and the model has no device mesh"):
        parallel.tensor_parallel_group(attachment, torch.zeros(1, 4, 2, 4))


@pytest.mark.parametrize("name", MODELS)
def test_a_device_map(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="transformers needs accelerate for device_map")
    model, _, _ = pair(name)
    inputs = make(name, "ragged-images")
    expected = generate(model, inputs)
    model.save_pretrained(tmp_path)
    placed = type(model).from_pretrained(tmp_path, attn_implementation="gap_triton", device_map={"": "cpu"})
    gap_triton.configure(placed, CONFIG)
    assert error(generate(placed, inputs), expected) == 0.0
    # Weights that come from the disk when their module runs, by hooks of accelerate around each forward.
    offloaded = accelerate.disk_offload(
        placed, str(tmp_path / "weights"), execution_device=torch.device("cpu")
    )
    assert error(generate(offloaded, inputs), expected) <= TOLERANCE
