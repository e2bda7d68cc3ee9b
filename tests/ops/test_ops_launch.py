"""What stands between an operator and its kernel: the cache of compiled kernels, and registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gap_kernels import launch as module
from gap_kernels import visual_importance
from gap_kernels.launch import launch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")


class Compiled:
    """Stands for a compiled kernel: notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments: self.launches.append((grid, *arguments))


class Kernel:
    """Stands for a function under ``triton.jit``: notes when it is asked to find or make a compiled kernel."""

    arg_names = ("x", "y", "stride", "size", "factor", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.told: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def compile_and_launch(*arguments: Any, **constants: Any) -> Compiled:
            self.told.append(constants)
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(module, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


FLOATS = torch.zeros(64)
HALVES = torch.zeros(64, dtype=torch.float16)


def call(kernel: Kernel, x=FLOATS, y=HALVES, stride=32, size=5, factor=0.5, block=16, grid=(3,), **options):
    launch(kernel, grid, (x, y), (stride,), (size,), (factor,), {"BLOCK": block}, **options)


def test_arguments_of_a_known_class_go_to_the_compiled_kernel(kernel: Kernel) -> None:
    call(kernel)
    other = torch.ones(64)
    call(kernel, x=other, stride=64, size=7, factor=2.0, grid=(4, 2))
    call(kernel, stride=0)
    assert len(kernel.compiled) == 1
    assert [len(launch) for launch in kernel.compiled[0].launches] == [7, 7]
    grid, x, y, *rest = kernel.compiled[0].launches[0]
    assert grid == (4, 2, 1)
    assert x is other
    assert y is HALVES
    assert rest == [64, 7, 2.0, 16]


@pytest.mark.parametrize(
    "change",
    [
        {"x": HALVES},  # another dtype
        {"x": None},
        {"x": FLOATS[1:]},  # a pointer that isn't aligned
        {"y": HALVES[1:]},
        {"stride": 24},
        {"stride": 1},  # which Triton makes a constant
        {"stride": 1 << 31},  # 64 bits
        {"size": 1 << 31},
        {"block": 32},
        {"num_warps": 8},
    ],
)
def test_another_class_is_looked_up_anew(kernel: Kernel, change: dict[str, Any]) -> None:
    call(kernel)
    if change.get("x", FLOATS) is None:
        change = {"y": None}  # the first tensor says where to launch
    for _ in range(2):
        call(kernel, **change)
    assert len(kernel.compiled) == 2
    assert len(kernel.compiled[0].launches) == 0
    assert len(kernel.compiled[1].launches) == 1


def test_pointers_aligned_in_different_places_differ(kernel: Kernel) -> None:
    call(kernel, x=FLOATS[1:])
    call(kernel, x=HALVES, y=FLOATS[1:])
    call(kernel, x=FLOATS, y=HALVES[1:])
    assert len(kernel.compiled) == 3


def test_a_stride_of_one_and_one_of_64_bits_differ(kernel: Kernel) -> None:
    """The former is a constant of the kernel, the latter isn't."""
    call(kernel, stride=1)
    call(kernel, stride=1 << 31)
    assert len(kernel.compiled) == 2


def test_options_differ_by_name(kernel: Kernel) -> None:
    call(kernel, num_warps=4)
    call(kernel, num_stages=4)
    assert len(kernel.compiled) == 2


@pytest.mark.parametrize("where", ["on AMD", "in the interpreter"])
def test_nobody_else_is_told_what_the_compiler_of_nvidia_is(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "on AMD":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    else:
        monkeypatch.setattr(module, "triton_is_interpreted", lambda: True)
    call(kernel, num_warps=4, maxnreg=128, ptx_options="--register-usage-level=3")
    assert kernel.told == [{"BLOCK": 16, "num_warps": 4}]


WORDS = [0, 1, 2, 15, 16, 17, *((1 << bits) + by for bits in (31, 32, 40) for by in (-16, -1, 0, 1, 16))]
integers = st.sampled_from(WORDS) | st.integers(0, (1 << 63) - 1)


@settings(deadline=None, max_examples=1000)
@given(st.lists(st.tuples(integers, integers), min_size=1, max_size=3))
@example([(1, 1 << 31)])
@example([(16, 1 << 31), (1, 17)])
def test_strides_of_one_class_are_specialised_on_alike(pairs: list[tuple[int, int]]) -> None:
    """By what Triton itself says of an integer: its type, a constant if it is 1, and whether it is a multiple of 16."""
    library = pytest.importorskip("triton._C.libtriton")
    if not hasattr(library, "native_specialize_impl"):
        pytest.skip("this version of Triton doesn't say how it specialises")
    from triton.backends.compiler import BaseBackend

    def specialised(values: tuple[int, ...]) -> list[Any]:
        return [library.native_specialize_impl(BaseBackend, value, False, True, True) for value in values]

    left, right = zip(*pairs, strict=True)
    same = module._classes(left, 1 << 31) == module._classes(right, 1 << 31)
    assert not same or specialised(left) == specialised(right)


def test_constants_must_come_in_the_order_of_the_kernel(kernel: Kernel) -> None:
    with pytest.raises(AssertionError):
        launch(kernel, (1,), (FLOATS, HALVES), (16,), (1,), (), {"BLOCK": 16})


def test_a_backward_pass_through_scores_is_an_error() -> None:
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    scores = visual_importance(query, torch.randn(1, 2, 3, 4), torch.tensor([[0, 1]]))
    with pytest.raises(RuntimeError, match=r"gap_kernels\.visual_importance has no gradient: detach\(\)"):
        scores.sum().backward()
