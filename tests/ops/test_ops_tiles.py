"""Which tiles a device gets; what they need of it is in ``tests/scripts/kernels_aot.py``."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from gap_kernels import tiles

CARDS = {
    (7, 5): tiles.OTHER,
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 7): "sm_86",
    (8, 9): "sm_86",  # a third less shared memory than 8.0
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (11, 0): tiles.OTHER,
    (12, 0): "sm_120",
    (12, 1): "sm_120",
}


@pytest.fixture(autouse=True)
def _no_device_known() -> Iterator[None]:
    tiles.architecture.cache_clear()
    yield
    tiles.architecture.cache_clear()


@pytest.mark.parametrize("capability", list(CARDS))
def test_nvidia(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability
    )
    for _ in range(3):
        assert tiles.architecture(torch.device("cuda", 1)) == CARDS[capability]
    assert asked == [torch.device("cuda", 1)], "asked once"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx942", "gfx942"), ("gfx1100", tiles.OTHER)],
)
def test_amd(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tiles.architecture(torch.device("cuda", 0)) == expected


def test_the_interpreter_has_one_class() -> None:
    assert tiles.architecture(torch.device("cpu")) == tiles.OTHER


def test_every_class_has_tiles_for_every_kernel() -> None:
    classes = {*CARDS.values(), "gfx942"}
    assert set(tiles.ATTENTION) == set(tiles.RECEIVED) == set(tiles.IMPORTANCE) == classes


@pytest.mark.parametrize(
    ("length", "name"),
    [
        (1, "short"),
        (64, "short"),
        (72, "odd"),
        (80, "padded"),
        (127, "odd"),
        (128, "full"),
        (129, "long"),
        (256, "long"),
    ],
)
def test_tiles_by_length(length: int, name: str) -> None:
    names = tiles.ByLength._fields
    by_length = tiles.ByLength(*[tiles.Tiles(16, 16, 4, number) for number in range(len(names))])
    assert names[by_length.of(length).stages] == name


@pytest.mark.parametrize("name", ["short", "padded", "full"])
def test_warps_of_attention_have_rows_of_their_own(name: str) -> None:
    """An instruction takes 16 rows, 32 on AMD's: a tile of fewer is computed twice, or its rows cross warps."""
    for architecture, by_length in tiles.ATTENTION.items():
        if architecture != tiles.OTHER:
            chosen = getattr(by_length, name)
            assert chosen.rows >= chosen.warps * (32 if architecture == "gfx942" else 16)


@pytest.mark.parametrize("kernel", [tiles.attention, tiles.received])
def test_float32_and_the_other_dtypes_differ(kernel) -> None:
    cpu = torch.device("cpu")
    half, exact = (kernel(128, dtype, cpu) for dtype in (torch.bfloat16, torch.float32))
    assert exact.part == 16 < half.part
    assert kernel(128, torch.float16, cpu) == half


@pytest.mark.parametrize(
    ("head_dim", "rows", "dtype", "expected"),
    [
        (128, 1, torch.bfloat16, (16, 64)),
        (128, 17, torch.bfloat16, (32, 64)),
        (80, 64, torch.bfloat16, (32, 32)),
        (32, 64, torch.bfloat16, (32, 64)),
        (48, 64, torch.bfloat16, (32, 32)),
        (256, 64, torch.float16, (32, 32)),
        (64, 64, torch.float32, (16, 32)),
        (256, 64, torch.float32, (16, 16)),
    ],
)
def test_one_launch_divides_scoring_as_several_do(
    head_dim: int, rows: int, dtype: torch.dtype, expected: tuple[int, int]
) -> None:
    """Or sums in the interpreter would not agree bit for bit. Its programs have more warps, and room for two."""
    for device_class in tiles.IMPORTANCE:
        several = tiles.importance(head_dim, rows, dtype, device_class)
        one = tiles.prune(head_dim, rows, dtype, device_class)
        assert one[:2] == several[:2] == expected
        assert (one.warps, several.warps) == (8, 4)
        assert one.warps * 32 * 2 * one.registers <= 65536


def test_what_the_compiler_is_told() -> None:
    assert tiles.Tiles(64, 32, 4, 2).options() == {"num_warps": 4, "num_stages": 2}
    told = {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
    assert tiles.Tiles(64, 32, 8, 3, registers=128).options() == told
    ahead = {"num_warps": 8, "num_stages": 3, "ptx_options": "--register-usage-level=3"}
    assert tiles.Tiles(64, 32, 8, 3, register_level=3).options() == ahead
