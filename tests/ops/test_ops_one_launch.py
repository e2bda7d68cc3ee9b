"""How ``prune_tokens`` is launched, as far as sizes decide it; what it computes is tested with the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from gap_kernels import tiles
from gap_kernels.prune import one_launch

from bench import shapes

H200 = SimpleNamespace(multi_processor_count=132, major=9)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What one launch on an H200 is told: the number of programs, constants and options."""
    seen: list[dict[str, Any]] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        seen.append({"programs": grid[0], **arguments[-1], **options})

    monkeypatch.setattr(one_launch, "launch", launch)
    monkeypatch.setattr(one_launch, "counters", lambda device, count: None)
    monkeypatch.setattr(one_launch, "_properties", lambda device: H200)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    return seen


def prune(
    device: torch.device, tokens: int, visual: int, heads: tuple[int, int], rows: int = 1, **options: Any
) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    query, key = empty(1, heads[0], tokens, 128), empty(1, heads[1], tokens, 128)
    hidden, rotary = empty(1, tokens, 64), empty(1, tokens, 128)
    ids, index = empty(1, 1, tokens, dtype=torch.int64), empty(1, visual, dtype=torch.int64)
    scoring = empty(1, rows, dtype=torch.int64)
    given = (query, key, hidden, rotary, rotary, ids, index, visual // 4, None, scoring, None, None, None)
    one_launch.prune_tokens(*given, tokens, **options)


@pytest.mark.parametrize(("tokens", "cooperative"), [(128, True), (640, False)])
def test_a_grid_that_does_not_fit_draws_tickets_whatever_was_asked(
    tokens: int, cooperative: bool, launched: list[dict[str, Any]]
) -> None:
    with FakeTensorMode():
        prune(CUDA, tokens, tokens - 64, (4, 4), ticket=False)
    (told,) = launched
    assert (told["programs"] <= 2 * 132) == cooperative
    assert told["launch_cooperative_grid"] == cooperative
    assert told["TICKET"] != cooperative


def test_tickets_unless_asked(launched: list[dict[str, Any]]) -> None:
    """A device says nothing of MPS and green contexts, which leave fewer multiprocessors than it has."""
    with FakeTensorMode():
        prune(CUDA, 128, 64, (4, 4))
    (told,) = launched
    assert told["programs"] <= 2 * 132
    assert told["TICKET"]
    assert not told["launch_cooperative_grid"]


@pytest.mark.parametrize("ticket", [False, True])
def test_without_a_gpu_it_is_as_asked(ticket: bool, launched: list[dict[str, Any]]) -> None:
    """The interpreter runs programs in order, and ahead of time nothing runs."""
    prune(torch.device("cpu"), 640, 576, (4, 4), ticket=ticket)
    assert launched[0]["TICKET"] == ticket
    assert launched[0]["launch_cooperative_grid"] != ticket


def named(name: str, batch: int, rows: int = 1) -> one_launch.Plan:
    """Divide the work of a prompt that has a name."""
    shape = shapes.find(name)
    return one_launch.plan(
        batch, shape.query_heads, shape.key_heads, shape.head_dim, shape.tokens, shape.tokens, rows, shape.visual,
        shape.length, shape.channels, shape.head_dim, shape.axes, torch.bfloat16, torch.bfloat16, False,
        "sm_90",
    )  # fmt: skip


CASES = {
    "LLaVA-1.5, last row": ("llava-1.5", 1, 1),
    "LLaVA-NeXT, last row": ("llava-next", 1, 1),
    "Qwen2.5-VL 4k, last row": ("qwen2.5-vl-4k", 1, 1),
    "Qwen2.5-VL 4k, 64 text rows": ("qwen2.5-vl-4k", 1, 64),
    "LLaVA-1.5, batch 8, last row": ("llava-1.5", 8, 1),
}


def test_large_grids_are_left_to_several_launches(launched: list[dict[str, Any]]) -> None:
    several = {
        name for name, case in CASES.items() if not one_launch.is_likely_faster(named(*case).programs, CUDA)
    }
    assert several == {"LLaVA-1.5, batch 8, last row"}
    for case in CASES.values():  # there is no time to be saved without a GPU
        assert one_launch.is_likely_faster(named(*case).programs, torch.device("cpu"))


def test_the_table_of_the_critical_path_is_of_today(launched: list[dict[str, Any]]) -> None:
    """As far as sizes decide it; what the binaries do is compiled by `make kernel-table` alone."""
    path = Path(__file__).resolve().parents[2] / "docs" / "results" / "critical-path.json"
    rows = {
        row["case"]: row
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if row["way"] == "one launch"
    }
    assert rows.keys() == CASES.keys()
    for name, case in CASES.items():
        work = named(*case)
        assert rows[name]["programs"] == [work.programs], "run `make kernel-table`"
        assert rows[name]["chosen"] == one_launch.is_likely_faster(work.programs, CUDA)
