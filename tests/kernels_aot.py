"""Ahead-of-time compilation of every kernel, for GPUs that needn't be there.

Not collected by default, as Triton's interpreter can't share a process with its compiler: ``test_ops_kernels.py``
runs this file in a process of its own. The launchers run as they do on a GPU, with specialisation by the arguments'
values and alignment, but every launch only compiles.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from gap_kernels.attention import kernel as attention
from gap_kernels.importance import kernel as importance
from gap_kernels.prune import kernel as prune
from gap_kernels.received import kernel as received
from gap_kernels.select import kernel as select
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


class OfflineDriver:
    """What the JIT asks a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # the JIT keeps one cache per device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@pytest.fixture(params=list(TARGETS))
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The kernels that the test's launches have compiled."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert all(size > 0 for size in grid)
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", OfflineDriver(TARGETS[request.param]))
    yield kernels
    assert kernels
    for kernel in kernels:
        check_resources(kernel, request.param)


def check_resources(kernel: Any, target: str) -> None:
    """Assert that nothing is spilled and that the shared memory fits."""
    name = f"{kernel.metadata.name} for {target}"
    assert kernel.metadata.shared <= SHARED_MEMORY_KIB[target] * 1024, (
        f"{name}: {kernel.metadata.shared} bytes"
    )
    if target.startswith("sm_"):
        registers, local = nvidia_resources(kernel)
        print(f"{name}: {registers} registers, {kernel.metadata.shared} bytes of shared memory")
        assert local == 0, f"{name}: {local} bytes of local memory, so registers are spilled"
    else:
        assembly = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1])
            for field in ("vgpr_count", "vgpr_spill_count")
        )
        print(f"{name}: {registers} registers, {kernel.metadata.shared} bytes of shared memory")
        assert spilled == 0, f"{name}: {spilled} registers are spilled"


def nvidia_resources(kernel: Any) -> tuple[int, int]:
    """Return registers per thread and bytes of local memory, from the binary."""
    path = Path(triton.knobs.cache.dir) / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]) + int(found[3])


@pytest.mark.parametrize("n", [576, 2048, 8192, 65536])
def test_select(compiled: list[Any], n: int) -> None:
    select.topk_indices(torch.zeros(2, n), n // 4, None, n // 4)
    select.topk_indices(torch.zeros(2, n), 0, torch.tensor([1, 2]), n // 4)


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "num_rows", "with_lse"),
    [
        (torch.float16, (32, 32), 128, None, False),
        (torch.bfloat16, (28, 4), 128, 64, False),
        (torch.bfloat16, (28, 4), 128, 64, True),
        (torch.float16, (16, 16), 80, None, True),
        (torch.bfloat16, (8, 4), 256, 16, False),
        (torch.float32, (8, 2), 128, 16, False),
    ],
)
def test_importance(
    compiled: list[Any],
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    num_rows: int | None,
    with_lse: bool,
) -> None:
    query = torch.zeros(1, heads[0], 128, head_dim, dtype=dtype)
    key = torch.zeros(1, heads[1], 128, head_dim, dtype=dtype)
    rows = None if num_rows is None else torch.arange(num_rows)[None]
    lse = torch.zeros(1, heads[0], num_rows or 1) if with_lse else None
    mask = torch.ones(1, 128, dtype=torch.bool)
    importance.visual_importance(query, key, torch.arange(64)[None], rows, mask, lse, None)


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "value_dim", "num_rows", "with_lse", "causal", "head_reduction"),
    [
        (torch.float16, (16, 16), 64, None, None, False, False, "mean"),
        (torch.bfloat16, (16, 16), 72, 72, 1, True, False, "max"),
        (torch.bfloat16, (28, 4), 128, 128, 64, False, True, "mean"),
        (torch.bfloat16, (28, 4), 128, 128, 64, True, True, "max"),
        (torch.bfloat16, (8, 4), 256, 256, 16, False, True, "mean"),
        (torch.bfloat16, (28, 4), 72, 72, 64, False, True, "mean"),
        (torch.float32, (28, 4), 72, 72, 64, True, True, "mean"),
        (torch.float32, (8, 2), 128, 256, 16, False, True, "mean"),
        (torch.float32, (8, 2), 256, 80, 33, True, False, "max"),
    ],
)
def test_importance_variants(
    compiled: list[Any],
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    value_dim: int | None,
    num_rows: int | None,
    with_lse: bool,
    causal: bool,
    head_reduction: str,
) -> None:
    query = torch.zeros(1, heads[0], 128, head_dim, dtype=dtype)
    key = torch.zeros(1, heads[1], 128, head_dim, dtype=dtype)
    value = None if value_dim is None else torch.zeros(1, heads[1], 128, value_dim, dtype=dtype)
    rows = None if num_rows is None else torch.arange(num_rows)[None]
    lse = torch.zeros(1, heads[0], num_rows or 1) if with_lse else None
    mask = torch.ones(1, 128, dtype=torch.bool)
    index = torch.arange(64)[None]
    importance.visual_importance(query, key, index, rows, mask, lse, None, causal, value, head_reduction)


@pytest.mark.parametrize("num_rows", [704, 2048, 8192, 16448])
def test_surviving_rows(compiled: list[Any], num_rows: int) -> None:
    visual_index = torch.arange(num_rows - 64)[None]
    mask = torch.ones(1, num_rows, dtype=torch.bool)
    counts = torch.tensor([64])
    prune.surviving_rows(torch.zeros(visual_index.shape), visual_index, 0, counts, mask, num_rows, 128)
    prune.surviving_rows(torch.zeros(visual_index.shape), visual_index, 64, None, None, num_rows, 128)


def test_gather_rows(compiled: list[Any]) -> None:
    rows = torch.zeros(1, 32, 4096, dtype=torch.bfloat16)
    rotary = torch.zeros(1, 32, 128, dtype=torch.bfloat16)
    prune.gather_rows(rows, rotary, rotary, torch.zeros(3, 1, 32).long(), torch.zeros(1, 8).long())


@pytest.mark.parametrize(
    ("dtype", "head_dim", "causal"),
    [
        *((torch.bfloat16, head_dim, True) for head_dim in (64, 72, 80, 96, 128, 256)),
        (torch.bfloat16, 80, False),
        (torch.float16, 128, False),
        (torch.float32, 128, True),
        (torch.float32, 256, True),
    ],
)
def test_attention(compiled: list[Any], dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    query, key = torch.zeros(1, 4, 64, head_dim, dtype=dtype), torch.zeros(1, 2, 64, head_dim, dtype=dtype)
    mask = torch.ones(1, 64, dtype=torch.bool) if causal else None
    attention.attention(query, key, key, causal, mask, None, None, None)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "packed"),
    [
        (torch.bfloat16, 64, False),
        (torch.bfloat16, 72, False),
        (torch.bfloat16, 80, True),
        (torch.float16, 128, False),
        (torch.bfloat16, 128, True),
        (torch.bfloat16, 256, True),
        (torch.float32, 80, False),
        (torch.float32, 256, True),
    ],
)
def test_received(compiled: list[Any], dtype: torch.dtype, head_dim: int, packed: bool) -> None:
    query, key = torch.zeros(1, 4, 64, head_dim, dtype=dtype), torch.zeros(1, 2, 64, head_dim, dtype=dtype)
    bounds = torch.tensor([0, 32, 64], dtype=torch.int32) if packed else None
    mask = None if packed else torch.ones(1, 64, dtype=torch.bool)
    received.attention_received(query, key, mask, bounds, not packed, None, None)
