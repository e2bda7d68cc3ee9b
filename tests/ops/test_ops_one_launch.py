"""How ``prune_tokens`` is launched, as far as sizes decide it; what it computes is tested with the kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from gap_kernels.prune import one_launch

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


@pytest.mark.parametrize(
    ("name", "sizes", "one"),
    [
        ("LLaVA-1.5", (1, 32, 32, 640, 1, 576), True),
        ("Qwen2.5-VL, last row", (1, 28, 4, 4160, 1, 4096), True),
        ("LLaVA-NeXT", (1, 32, 32, 2944, 1, 2880), False),
        ("LLaVA-1.5, batch 8", (8, 32, 32, 640, 1, 576), False),
    ],
)
def test_one_launch_for_small_prompts(
    name: str, sizes: tuple[int, ...], one: bool, launched: list[dict[str, Any]]
) -> None:
    batch, heads, key_heads, tokens, rows, visual = sizes
    work = one_launch.plan(
        batch, heads, key_heads, 128, tokens, tokens, rows, visual, visual // 4 + 64, 4096, 128, 1,
        torch.bfloat16, False,
    )  # fmt: skip
    assert one_launch.is_likely_faster(work.programs, CUDA) == one
    assert one_launch.is_likely_faster(work.programs, torch.device("cpu"))
