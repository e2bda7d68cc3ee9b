"""Ahead-of-time compilation of every kernel, for GPUs that needn't be there.

Not collected by default, as Triton's interpreter can't share a process with its compiler: ``test_ops_compiled.py``
runs this file in a process of its own. The launchers run as they do on a GPU, with specialisation by the arguments'
values and alignment, but every launch only compiles. What the binaries need is compared with the budgets below, and with
docs/results/kernels.json, which ``python tests/scripts/kernels_aot.py`` writes.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from gap_kernels import launch as launching
from gap_kernels import tiles
from gap_kernels.aggregate import kernel as aggregate
from gap_kernels.corrected import kernel as corrected
from gap_kernels.cosine import kernel as cosine
from gap_kernels.flash_attention import kernel as attention
from gap_kernels.greedy import kernel as greedy
from gap_kernels.importance import kernel as importance
from gap_kernels.merge import kernel as merge
from gap_kernels.prompt import kernel as prompt_kernel
from gap_kernels.prune import kernel as prune
from gap_kernels.prune import one_launch
from gap_kernels.raters import kernel as raters
from gap_kernels.received import kernel as received
from gap_kernels.region import grid_neighbours
from gap_kernels.region import kernel as region
from gap_kernels.rotation import kernel as rotation
from gap_kernels.scatter import kernel as scatter
from gap_kernels.select import kernel as select
from gap_kernels.similarity import kernel as similarity
from gap_kernels.windows import kernel as windows
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `make kernel-table` runs this file

from support import ptx_paths

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TABLE = Path(__file__).resolve().parents[2] / "docs" / "results" / "kernels.json"


class Multiprocessor(NamedTuple):
    """What the programs that run at the same time on one multiprocessor share; from the CUDA programming guide."""

    shared_kib: int
    program_kib: int  # of which one program can have
    warps: int
    programs: int
    registers: int = 65536


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = {
    "sm_80": Multiprocessor(shared_kib=164, program_kib=163, warps=64, programs=32),
    "sm_86": Multiprocessor(shared_kib=100, program_kib=99, warps=48, programs=16),
    "sm_90": Multiprocessor(shared_kib=228, program_kib=227, warps=64, programs=32),
    "sm_100": Multiprocessor(shared_kib=228, program_kib=227, warps=64, programs=32),
    "sm_120": Multiprocessor(shared_kib=100, program_kib=99, warps=48, programs=24),
}
AMD_PROGRAM_KIB = 64
ENTRIES_ONLY = "sm_86"
"""A target whose compiler is nearly that of sm_80: only what has tiles of its own is compiled for it, once per entry."""
WITHOUT_SPILLS = ("3.7.1", "3.9.0")
"""Versions of Triton that tiles were chosen with: nothing may be spilled, but for `SPILLED`."""
SPILLED = {("3.9.0", "sm_86"): 8}
"""Bytes of a thread, by version and target: of ``received_mass_kernel`` with packed sequences."""
SPILLED_BY_ANOTHER_COMPILER = 24
"""Likewise: ``assign_kernel`` on sm_90, of Triton 3.6.0."""
SYSTEM_SHARED_KIB = 1
"""Of the multiprocessor's shared memory, for each program beside its own."""

# Registers per thread and KiB of shared memory per program that a kernel may need at most, on NVIDIA GPUs and on gfx942,
# within what a program can have. Some more than triton 3.7.1 needs.
BUDGETS = {
    "text_share_kernel": ((128, 20), (160, 12)),
    "text_rater_kernel": ((64, 1), (64, 1)),
    "text_sum_kernel": ((64, 2), (64, 2)),
    "text_cosine_kernel": ((128, 2), (128, 2)),
    "read_prompt_kernel": ((128, 1), (96, 1)),
    "topk_indices_kernel": ((128, 1), (96, 1)),
    "topk_per_region_kernel": ((128, 1), (96, 1)),
    "window_ranks_kernel": ((128, 1), (128, 1)),
    "row_lse_kernel": ((144, 50), (280, 25)),
    "visual_mass_kernel": ((168, 36), (384, 24)),
    "stored_mean_kernel": ((128, 6), (96, 6)),
    "mean_kernel": ((56, 1), (48, 2)),
    "corrected_mass_kernel": ((176, 16), (208, 6)),
    "best_heads_kernel": ((56, 1), (32, 1)),
    "surviving_rows_kernel": ((128, 1), (128, 1)),
    "gather_rows_kernel": ((64, 1), (48, 1)),
    "unrotate_kernel": ((80, 9), (64, 1)),
    "scatter_rows_kernel": ((72, 1), (64, 1)),
    "prune_kernel": ((128, 49), None),
    "attention_kernel": ((255, 132), (256, 48)),
    "token_lse_kernel": ((216, 72), (192, 48)),
    "received_mass_kernel": ((216, 72), (256, 48)),
    "received_mean_kernel": ((40, 1), (32, 2)),
    "spatial_weights_kernel": ((168, 48), (192, 48)),
    "spatial_aggregate_kernel": ((104, 48), (160, 48)),
    "cosines_kernel": ((192, 48), (144, 48)),
    "collect_kernel": ((128, 3), (128, 3)),
    "assign_kernel": ((168, 48), (208, 48)),
    "merge_kernel": ((96, 48), (160, 48)),
    "prepare_kernel": ((64, 1), (64, 1)),
    "pairs_kernel": ((168, 16), (272, 16)),
    "choose_kernel": ((128, 2), (128, 2)),
    "cover_kernel": ((128, 2), (96, 2)),
    "rest_kernel": ((104, 1), (64, 1)),
    "remove_kernel": ((128, 9), (64, 1)),
    "least_similar_kernel": ((128, 1), (96, 1)),
}


@dataclass(frozen=True)
class Row:
    """What one kernel needs, compiled for one target.

    Attributes:
        kernel: Name of the kernel.
        case: The case that compiles it, the first if there are several.
        target: One of TARGETS.
        warps: Per program.
        registers: Per thread.
        spilled: Bytes of a thread that are in memory for want of registers, or because they are addressed.
        shared: Bytes of shared memory per program.
        resident: Programs that a multiprocessor has room for at the same time; None where it wasn't worked out.
    """

    kernel: str
    case: str
    target: str
    warps: int
    registers: int
    spilled: int
    shared: int
    resident: int | None


class Shape(NamedTuple):
    """A prompt; ``visual`` of its ``tokens`` are visual."""

    heads: int
    key_heads: int
    head_dim: int
    tokens: int
    visual: int


LLAVA_15 = Shape(32, 32, 128, 640, 576)
LLAVA_NEXT = Shape(32, 32, 128, 2944, 2880)
QWEN = Shape(28, 4, 128, 4096, 4032)  # Qwen2.5-VL
QWEN_8K = Shape(28, 4, 128, 8192, 8128)  # the most that the one launch takes
QWEN_VIDEO = Shape(28, 4, 128, 16448, 16384)
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def of_heads(heads: int, key_heads: int, head_dim: int) -> Shape:
    """Return a prompt of LLaVA-1.5's length for other heads."""
    return Shape(heads, key_heads, head_dim, LLAVA_15.tokens, LLAVA_15.visual)


Case = tuple[str, partial[object]]
"""A name, and a launch."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return memory that isn't even touched: nothing reads it."""
    return torch.empty(shape, dtype=dtype)


def cases(target: str) -> Iterator[Case]:
    """Name every launch for a target."""
    if target == ENTRIES_ONLY:
        yield from entry_cases()
        for name, launch in entry_cases():
            yield f"{name}, other GPUs", partial(launch_as_other_gpus, launch)
        return
    yield from prompt_cases()
    yield from raters_cases()
    yield from cosine_cases()
    yield from select_cases()
    yield from region_cases()
    yield from windows_cases()
    yield from importance_cases()
    yield from importance_variants()
    yield from corrected_cases()
    yield from prune_cases()
    yield from scatter_cases()
    yield from rotation_cases()
    yield from one_launch_cases()
    yield from attention_cases()
    yield from received_cases()
    yield from aggregate_cases()
    yield from merge_cases()
    yield from greedy_cases()
    yield from similarity_cases()


def launch_as_other_gpus(launch: partial[object]) -> None:
    """Launch with the tiles of GPUs that have none of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "architecture", lambda device: tiles.OTHER)
        launch()


def prompt_cases() -> Iterator[Case]:
    tokens = torch.zeros(2, LLAVA_15.tokens, dtype=torch.int64)
    widths = (LLAVA_15.visual, 64)
    yield "640 tokens", partial(prompt_kernel.read_prompt, tokens, (5,), tokens, None, None, None, *widths)
    mask = tokens == 0
    given = (mask, (), mask, mask, mask, tokens, *widths)
    yield "640 rows left, every mask", partial(prompt_kernel.read_prompt, *given)


def raters_cases() -> Iterator[Case]:
    rows = torch.zeros(2, LLAVA_15.visual, dtype=torch.int64)
    for dtype, channels in (
        (torch.float16, 4096),
        (torch.bfloat16, 4096),
        (torch.float32, 4096),
        (torch.bfloat16, 1000),
    ):
        embeds = empty(2, LLAVA_15.tokens, channels, dtype=dtype)
        yield (
            f"{channels:,} channels, {DTYPES[dtype]}",
            partial(raters.text_raters, embeds, rows, rows[:, :64]),
        )


def cosine_cases() -> Iterator[Case]:
    rows = torch.zeros(2, LLAVA_15.visual, dtype=torch.int64)
    for dtype, channels in ((torch.bfloat16, 4096), (torch.float32, 1000)):
        embeds = empty(2, LLAVA_15.tokens, channels, dtype=dtype)
        yield (
            f"{channels:,} channels, {DTYPES[dtype]}",
            partial(cosine.text_cosine, embeds, rows, rows[:, :64]),
        )


def select_cases() -> Iterator[Case]:
    for n in (576, 2048, 2880, 8192, 16384, 65536):
        yield f"{n:,} scores", partial(select.topk_indices, empty(2, n), n // 4, None, n // 4)
    for n in (576, 65536):
        given = (empty(2, n), 0, torch.tensor([1, 2]), n // 4)
        yield f"{n:,} scores, k per sample", partial(select.topk_indices, *given)


def region_cases() -> Iterator[Case]:
    for side, cells, per_sample in (
        (24, (2, 2), False),
        (24, (3, 3), False),
        (64, (2, 2), False),
        (90, (3, 3), False),
        (128, (2, 2), False),
        (128, (3, 3), True),
        (256, (2, 2), False),
        (256, (3, 3), True),
    ):
        n = side * side
        neighbours = grid_neighbours((side, side), cells)[None]
        counts = torch.tensor([1, 2]) if per_sample else None
        name = f"{n:,} scores, {neighbours.shape[2]} neighbours{', k per sample' if per_sample else ''}"
        yield name, partial(region.topk_per_region, empty(2, n), neighbours, 1, n // 4, counts, n // 4)
    given = (empty(2, 577)[:, 1:], grid_neighbours((24, 24))[None], 1, 144, None, 144)
    yield "576 of 577 scores, 3 neighbours", partial(region.topk_per_region, *given)


def prompt(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and the positions of visual tokens."""
    query = empty(1, shape.heads, shape.tokens, shape.head_dim, dtype=dtype)
    key = empty(1, shape.key_heads, shape.tokens, shape.head_dim, dtype=dtype)
    return query, key, torch.arange(shape.visual)[None]


def scoring(
    shape: Shape, num_rows: int | None, with_lse: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Return rows, attention mask and log-sum-exp."""
    rows = None if num_rows is None else torch.arange(num_rows)[None]
    lse = empty(1, shape.heads, num_rows or 1) if with_lse else None
    return rows, torch.ones(1, shape.tokens, dtype=torch.bool), lse


def described(name: str, dtype: torch.dtype, num_rows: int | None, with_lse: bool) -> str:
    """Return the name of a case of importance."""
    rows = "last row" if num_rows is None else f"{num_rows} rows"
    return f"{name}, {DTYPES[dtype]}, {rows}{', lse' if with_lse else ''}"


def importance_cases() -> Iterator[Case]:
    for name, shape, dtype, num_rows, with_lse in (
        ("LLaVA-1.5", LLAVA_15, torch.float16, None, False),
        ("LLaVA-1.5", LLAVA_15, torch.float16, None, True),
        ("LLaVA-NeXT", LLAVA_NEXT, torch.bfloat16, None, False),
        ("Qwen2.5-VL", QWEN, torch.bfloat16, None, False),
        ("Qwen2.5-VL", QWEN, torch.bfloat16, 64, False),
        ("Qwen2.5-VL", QWEN, torch.bfloat16, 64, True),
        ("Qwen2.5-VL video", QWEN_VIDEO, torch.bfloat16, None, False),
        ("Qwen2.5-VL video", QWEN_VIDEO, torch.bfloat16, 64, False),
        ("LLaVA-1.5", LLAVA_15, torch.float32, None, False),
        ("Qwen2.5-VL", QWEN, torch.float32, 64, False),
        ("Qwen2.5-VL", QWEN, torch.float32, 64, True),
        ("head_dim 64", of_heads(16, 16, 64), torch.bfloat16, 64, False),
        ("head_dim 72", of_heads(16, 16, 72), torch.bfloat16, None, False),
        ("head_dim 72", of_heads(16, 16, 72), torch.bfloat16, 64, False),
        ("head_dim 80", of_heads(16, 16, 80), torch.bfloat16, 64, False),
        ("head_dim 96", of_heads(32, 32, 96), torch.bfloat16, 64, False),
        ("head_dim 256", of_heads(8, 4, 256), torch.bfloat16, None, False),
        ("head_dim 256", of_heads(8, 4, 256), torch.bfloat16, 64, False),
        ("head_dim 72", of_heads(16, 16, 72), torch.float32, 64, False),
        ("head_dim 256", of_heads(8, 4, 256), torch.float32, 64, False),
    ):
        query, key, index = prompt(shape, dtype)
        given = (query, key, index, *scoring(shape, num_rows, with_lse), None)
        yield described(name, dtype, num_rows, with_lse), partial(importance.visual_importance, *given)


def importance_variants() -> Iterator[Case]:
    for head_dim, dtype, value_dim, num_rows, with_lse, causal, reduction in (
        (64, torch.float16, None, None, False, False, "mean"),
        (72, torch.bfloat16, 72, 1, True, False, "max"),
        (128, torch.bfloat16, 128, 64, False, True, "mean"),
        (128, torch.bfloat16, 128, 64, True, True, "max"),
        (256, torch.bfloat16, 256, 16, False, True, "mean"),
        (72, torch.bfloat16, 72, 64, False, True, "mean"),
        (72, torch.float32, 72, 64, True, True, "mean"),
        (128, torch.float32, 256, 16, False, True, "mean"),
        (256, torch.float32, 80, 33, True, False, "max"),
    ):
        shape = of_heads(28, 4, head_dim)
        query, key, index = prompt(shape, dtype)
        value = None if value_dim is None else empty(1, 4, shape.tokens, value_dim, dtype=dtype)
        given = (query, key, index, *scoring(shape, num_rows, with_lse), None, causal, value, reduction)
        name = f"head_dim {head_dim}"
        name += "" if value_dim is None else f", value_dim {value_dim}"
        name += ("" if causal else ", not causal") + (", max" if reduction == "max" else "")
        yield described(name, dtype, num_rows, with_lse), partial(importance.visual_importance, *given)


def corrected_cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        query, key, index = prompt(QWEN, dtype)
        rows, mask, _ = scoring(QWEN, 64, False)
        angles = empty(1, QWEN.tokens, QWEN.head_dim, dtype=dtype)
        turns = torch.zeros(QWEN.head_dim).long()
        given = (query, key, index, angles, angles, turns, 12, rows, mask, None)
        name = described("Qwen2.5-VL", dtype, 64, False)
        yield name, partial(corrected.corrected_importance, *given)


def spread_over(coverage: str, num_visual: int) -> tuple[Any, ...]:
    """Return a coverage with what it needs."""
    neighbours = torch.zeros(1, num_visual, 3, dtype=torch.int32) if coverage == "region" else None
    order = torch.arange(num_visual)[None] if coverage == "stride" else None
    return coverage, neighbours, 0, order


def prune_cases() -> Iterator[Case]:
    for num_rows, with_mask, coverage in (
        (640, True, "topk"),
        (640, False, "region"),
        (640, True, "stride"),
        (2944, True, "topk"),
        (8192, True, "region"),
        (16448, True, "topk"),
        (16448, True, "stride"),
    ):
        index, scores = torch.arange(num_rows - 64)[None], empty(1, num_rows - 64)
        name = f"{num_rows:,} rows"
        given: tuple[Any, ...] = (scores, index, 64, None, None, num_rows, 128)
        if with_mask:
            name += ", mask, keep per sample"
            mask = torch.ones(1, num_rows, dtype=torch.bool)
            given = (scores, index, 0, torch.tensor([64]), mask, num_rows, 128)
        name += "" if coverage == "topk" else f", {coverage}"
        yield name, partial(prune.surviving_rows, *given, *spread_over(coverage, num_rows - 64))
    for dtype, axes in ((torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float32, 3)):
        rows, rotary = empty(1, 640, 4096, dtype=dtype), empty(1, 640, 128, dtype=dtype)
        given = (rows, rotary, rotary, torch.zeros(axes, 1, 640).long(), torch.zeros(1, 128).long())
        ids = "position_ids" if axes == 1 else f"{axes} axes of position_ids"
        yield f"4,096 channels, {DTYPES[dtype]}, {ids}", partial(prune.gather_rows, *given)


def one_launch_cases() -> Iterator[Case]:
    for name, shape, dtype, num_rows, with_lse, ticket, coverage in (
        ("LLaVA-1.5", LLAVA_15, torch.bfloat16, None, False, True, "topk"),
        ("LLaVA-1.5", LLAVA_15, torch.float16, None, True, False, "topk"),
        ("LLaVA-NeXT", LLAVA_NEXT, torch.bfloat16, None, False, False, "topk"),
        ("LLaVA-NeXT", LLAVA_NEXT, torch.bfloat16, 64, True, True, "region"),
        ("Qwen2.5-VL", QWEN, torch.bfloat16, None, False, True, "topk"),
        ("Qwen2.5-VL", QWEN, torch.bfloat16, 64, False, False, "topk"),
        ("Qwen2.5-VL, 8,192 rows", QWEN_8K, torch.bfloat16, 64, False, True, "topk"),
        ("Qwen2.5-VL", QWEN, torch.bfloat16, 64, False, True, "stride"),
        ("LLaVA-1.5", LLAVA_15, torch.float32, None, False, False, "topk"),
        ("Qwen2.5-VL", QWEN, torch.float32, 64, False, False, "region"),
        ("head_dim 72", of_heads(16, 16, 72), torch.float16, None, False, False, "topk"),
        ("head_dim 256", of_heads(8, 4, 256), torch.bfloat16, 16, False, False, "topk"),
        ("head_dim 256", of_heads(8, 4, 256), torch.float32, None, False, False, "topk"),
    ):
        query, key, index = prompt(shape, dtype)
        hidden, rotary = empty(1, shape.tokens, 4096, dtype=dtype), empty(1, shape.tokens, 128, dtype=dtype)
        rows, mask, lse = scoring(shape, num_rows, with_lse)
        ids = torch.zeros(3, 1, shape.tokens).long()
        given = (
            query,
            key,
            hidden,
            rotary,
            rotary,
            ids,
            index,
            64,
            None,
            rows,
            mask,
            lse,
            None,
            shape.tokens // 2,
            *spread_over(coverage, shape.visual),
        )
        name = described(name, dtype, num_rows, with_lse) + (", ticket" if ticket else "")
        name += "" if coverage == "topk" else f", {coverage}"
        yield name, partial(one_launch.prune_tokens, *given, ticket=ticket)


def attention_case(head_dim: int, dtype: torch.dtype, causal: bool) -> Case:
    query, key, _ = prompt(of_heads(4, 2, head_dim), dtype)
    mask = torch.ones(1, key.shape[2], dtype=torch.bool) if causal else None
    name = f"head_dim {head_dim}, {DTYPES[dtype]}, {'causal, mask' if causal else 'not causal'}"
    return name, partial(attention.attention, query, key, key, causal, mask, None, None, None)


def attention_cases() -> Iterator[Case]:
    for head_dim, dtype, causal in (
        *((head_dim, torch.bfloat16, True) for head_dim in (64, 72, 80, 128, 256)),
        (80, torch.bfloat16, False),
        (128, torch.float16, False),
        *((head_dim, torch.float32, True) for head_dim in (64, 72, 256)),
    ):
        yield attention_case(head_dim, dtype, causal)


def received_case(head_dim: int, dtype: torch.dtype, packed: bool) -> Case:
    query, key, _ = prompt(of_heads(4, 2, head_dim), dtype)
    bounds = torch.tensor([0, 32, key.shape[2]], dtype=torch.int32) if packed else None
    mask = None if packed else torch.ones(1, key.shape[2], dtype=torch.bool)
    name = f"head_dim {head_dim}, {DTYPES[dtype]}, {'packed' if packed else 'causal, mask'}"
    return name, partial(received.attention_received, query, key, mask, bounds, not packed, None, None)


def received_cases() -> Iterator[Case]:
    for head_dim, dtype, packed in (
        (64, torch.bfloat16, False),
        (72, torch.bfloat16, False),
        (72, torch.bfloat16, True),
        (80, torch.bfloat16, True),
        (128, torch.float16, False),
        (256, torch.bfloat16, True),
        (64, torch.float32, False),
        (256, torch.float32, True),
    ):
        yield received_case(head_dim, dtype, packed)


def entry_cases() -> Iterator[Case]:
    """Name launches for each entry of the tables of tiles."""
    for head_dim in (64, 72, 80, 128, 256):
        yield attention_case(head_dim, torch.bfloat16, True)
        yield received_case(head_dim, torch.bfloat16, head_dim not in (64, 128))


def windows_cases() -> Iterator[Case]:
    for side in (24, 256):
        n = side * side
        given = (empty(2, n), empty(2, n), side, side, n // 8, 4)
        yield f"{n:,} scores, 4 x 4 windows", partial(windows.window_ranks, *given)


def scatter_cases() -> Iterator[Case]:
    index = torch.zeros(2, 208).long()
    for dtype, channels in ((torch.bfloat16, 4096), (torch.float32, 1000)):
        rows, base = empty(2, 208, channels, dtype=dtype), empty(2, LLAVA_15.tokens, channels, dtype=dtype)
        name = f"{channels:,} channels, {DTYPES[dtype]}"
        yield name, partial(scatter.scatter_rows, rows, index, LLAVA_15.tokens, None, None)
        yield (
            f"{name}, among others",
            partial(scatter.scatter_rows, rows, index, LLAVA_15.tokens, index, base),
        )


def rotation_cases() -> Iterator[Case]:
    for shape, dtype, axes, rescale in (
        (LLAVA_15, torch.bfloat16, None, False),
        (of_heads(8, 2, 80), torch.float32, 3, True),
    ):
        query = empty(1, shape.heads, shape.tokens, shape.head_dim, dtype=dtype)
        of_axes = [] if axes is None else [axes]
        cos = empty(*of_axes, 1, shape.tokens, shape.head_dim, dtype=dtype)
        pairs = torch.zeros(2, shape.head_dim, dtype=torch.int32)
        name = f"head_dim {shape.head_dim}, {DTYPES[dtype]}" + (", 3 axes, rescaled" if rescale else "")
        yield name, partial(rotation.unrotate, query, query[:, : shape.key_heads], cos, cos, pairs, rescale)


def aggregate_cases() -> Iterator[Case]:
    for side, channels, length, dtype, similarity_dtype, pillars, self_weight in (
        (24, 1024, 1024, torch.float16, torch.float16, "pillars by score", 1.0),
        (32, 3584, 1280, torch.bfloat16, torch.bfloat16, "pillars by score", None),
        (24, 1000, 72, torch.bfloat16, torch.float32, None, 1.0),
        (24, 75, 33, torch.float16, torch.float16, "pillars", 1.0),
        (24, 75, 33, torch.float32, torch.float32, None, None),
    ):
        features = empty(1, side * side, channels, dtype=dtype)
        similarity = empty(1, side * side, length, dtype=similarity_dtype)
        anchors = torch.zeros(1, 112).long()
        mask = torch.zeros(1, 112, dtype=torch.bool) if pillars == "pillars" else None
        scores = empty(1, side * side) if pillars == "pillars by score" else None
        name = f"{channels:,} channels, {DTYPES[dtype]}, cosines of {length:,} {DTYPES[similarity_dtype]}"
        name += ("" if pillars is None else f", {pillars}") + ("" if self_weight is None else ", self weight")
        given = (features, similarity, anchors, side, 280**0.5, mask, self_weight, scores, 11, 20)
        yield name, partial(aggregate.spatial_aggregate, *given)


def merge_cases() -> Iterator[Case]:
    for channels, length, dtype in ((4096, 1024, torch.bfloat16), (75, 33, torch.float32)):
        features, keys = empty(1, 576, channels, dtype=dtype), empty(1, 576, length, dtype=dtype)
        kept, name = (
            torch.zeros(1, 112).long(),
            f"{channels:,} channels, cosines of {length:,}, {DTYPES[dtype]}",
        )
        yield name, partial(merge.collect_nearest, features, keys, empty(1, 576), kept, 32)
        yield name, partial(merge.merge_nearest, features, keys, kept, kept, False)


def greedy_cases() -> Iterator[Case]:
    for rule, tokens, channels, dtype, with_scores in (
        ("max_min", 576, 1024, torch.float16, False),
        ("determinant", 576, 1024, torch.bfloat16, True),
        ("coverage_gain", 576, 1024, torch.bfloat16, True),
        ("coverage_gain", 5000, 75, torch.float16, False),
        ("determinant", 576, 1024, torch.float32, False),
        ("max_min", 576, 75, torch.float32, False),
    ):
        features = empty(1, tokens, channels, dtype=dtype)
        scores = empty(1, tokens) if with_scores else None
        name = f"{rule}, {tokens:,} tokens, {channels:,} channels, {DTYPES[dtype]}{', scores' if with_scores else ''}"
        # Of coverage of many tokens, two steps are what many are: launches of the same kernels.
        given = (features, scores, None, rule, 1.0, 2, torch.tensor([2]) if with_scores else None, 2)
        yield name, partial(greedy.greedy_indices, *given)


def similarity_cases() -> Iterator[Case]:
    """Of features that merges are compared by, too: the cosines are the same kernel."""
    features, scores = empty(1, 576, 1024, dtype=torch.bfloat16), empty(1, 576)
    yield "576 tokens", partial(similarity.distinct_indices, features, scores, 128, 64, 8)
    pivots, mask = torch.zeros(1, 4).long(), torch.ones(1, 576, dtype=torch.bool)
    for name, more in (
        ("576 tokens", (None, 128, None, 128)),
        ("576 tokens, mask, k per sample", (mask, 0, torch.tensor([2]), 128)),
    ):
        yield name, partial(similarity.least_similar_indices, features, pivots, *more)


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


class Launch(NamedTuple):
    """A launch that only compiled: ``values`` are the kernel's arguments by name."""

    kernel: JITFunction
    compiled: Any
    grid: tuple[int, ...]
    values: dict[str, Any]


def launched_by(launchers: Iterable[partial[object]], target: str) -> list[Launch]:
    """Run launchers as on a GPU of that kind, and return what they launch."""
    launched: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(size > 0 for size in grid)
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launched.append(Launch(self, run(self, *args, grid=grid, warmup=True, **kwargs), grid, values))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(triton.runtime.driver, "_active", OfflineDriver(TARGETS[target]))
        patch.setattr(torch.version, "hip", None if target in NVIDIA else "for launchers that ask")
        patch.setattr(tiles, "architecture", lambda device: target)
        for launcher in launchers:
            launcher()
    return launched


@functools.cache
def compiled(target: str) -> list[Row]:
    """Return what every kernel needs, compiled for a target."""
    return [measured(kernel, name, target) for kernel, name in kernels(target).items()]


@functools.cache
def kernels(target: str) -> dict[Any, str]:
    """Compile every kernel for a target, each once; beside it the name of the first case that launches it."""
    first_case: dict[Any, str] = {}
    for name, launcher in cases(target):
        if target in NVIDIA or launcher.func is not one_launch.prune_tokens:  # which is for NVIDIA alone
            for launch in launched_by([launcher], target):
                first_case.setdefault(launch.compiled, name)
    return first_case


def measured(kernel: Any, case: str, target: str) -> Row:
    """Read from a binary what it needs."""
    warps, shared, resident = kernel.metadata.num_warps, kernel.metadata.shared, None
    if target in NVIDIA:
        registers, spilled = nvidia_resources(kernel.asm["cubin"])
        resident = resident_programs(NVIDIA[target], warps, registers, shared)
    else:
        registers, spilled = amd_resources(kernel.asm["amdgcn"])
    return Row(kernel.metadata.name, case, target, warps, registers, spilled, shared, resident)


def nvidia_resources(binary: bytes) -> tuple[int, int]:
    """Return registers per thread and its bytes of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]) + int(found[3])


def amd_resources(assembly: str) -> tuple[int, int]:
    """Return vector registers per thread and its bytes of scratch memory."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spilled = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    assert registers, assembly
    assert spilled, assembly
    return int(registers[1]), int(spilled[1])


def resident_programs(multiprocessor: Multiprocessor, warps: int, registers: int, shared: int) -> int:
    """Return how many programs a multiprocessor runs at the same time.

    A warp's registers come in units of 256, and in each of the four parts of a multiprocessor.
    """
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = multiprocessor.registers // 4 // of_warp * 4 // warps
    by_shared = multiprocessor.shared_kib * 1024 // (shared + SYSTEM_SHARED_KIB * 1024)
    return min(by_registers, by_shared, multiprocessor.warps // warps, multiprocessor.programs)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(target: str) -> None:
    otherwise = 0 if triton.__version__ in WITHOUT_SPILLS else SPILLED_BY_ANOTHER_COMPILER
    allowed = SPILLED.get((triton.__version__, target), otherwise)
    assert [row for row in compiled(target) if row.spilled > allowed] == []


@pytest.mark.parametrize("target", TARGETS)
def test_budgets(target: str) -> None:
    budgets = {name: nvidia if target in NVIDIA else amd for name, (nvidia, amd) in BUDGETS.items()}
    over, met = [], set()
    for row in compiled(target):
        met.add(row.kernel)
        budget = budgets[row.kernel]
        most_kib = NVIDIA[target].program_kib if target in NVIDIA else AMD_PROGRAM_KIB
        if budget is None or row.registers > budget[0] or row.shared > min(budget[1], most_kib) * 1024:
            over.append((row, budget))
    assert over == []
    assert target == ENTRIES_ONLY or met == {name for name, budget in budgets.items() if budget}


@pytest.mark.parametrize("target", [target for target in NVIDIA if target != ENTRIES_ONLY])
def test_the_programs_of_one_launch_fit_a_multiprocessor(target: str) -> None:
    """Or a cooperative launch of as many as ``programs_at_once`` says would be refused."""
    rows = [row for row in compiled(target) if row.kernel == "prune_kernel"]
    assert rows
    for row in rows:
        wanted = one_launch.PROGRAMS_PER_MULTIPROCESSOR
        shared_kib = wanted * (row.shared / 1024 + SYSTEM_SHARED_KIB)
        assert row.warps == 8, row
        assert row.registers <= 128, row
        assert shared_kib <= NVIDIA[target].shared_kib, row
        assert row.resident is not None
        assert row.resident >= wanted, row


# The products of sm_100 are in a memory of their own.
@pytest.mark.parametrize("target", [target for target in NVIDIA if target != "sm_100"])
def test_a_row_of_attention_belongs_to_one_warp(target: str) -> None:
    """Where a tile has the 16 rows of an instruction for each warp; otherwise maxima and sums of a row cross warps."""
    checked = set()
    for kernel, name in kernels(target).items():
        head_dim = re.match(r"head_dim (\d+), b?float16", name)
        if kernel.metadata.name != "attention_kernel" or not head_dim or "other" in name:
            continue
        chosen = tiles.ATTENTION[target].of(int(head_dim[1]))
        if chosen.rows >= 16 * chosen.warps:
            layouts = re.findall(r"nvidia_mma<\{[^}]*warpsPerCTA = \[(\d+), (\d+)\]", kernel.asm["ttgir"])
            assert set(layouts) == {(str(chosen.warps), "1")}, name
            checked.add(int(head_dim[1]))
    assert {64, 80, 128} <= checked


def test_a_kept_kernel_is_handed_what_the_compiler_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is the convention of one version of Triton: the launcher calls its compiled kernels by position."""
    handed: list[tuple[Any, ...]] = []

    def load(self: CompiledKernel) -> None:
        self._run = lambda *given: handed.append((self, *given))

    monkeypatch.setattr(CompiledKernel, "_init_handles", load)
    monkeypatch.setattr(CompiledKernel, "launch_metadata", lambda self, grid, stream, *given: None)
    monkeypatch.setattr(triton.runtime.driver, "_active", OfflineDriver(TARGETS["sm_90"]))
    mass, rows, scores = empty(1, 32, 576), torch.arange(4)[None], empty(1, 576)
    given = (mass, rows, scores), (), (640, 4, 576), ()
    constants = {"KEY_HEADS": 32, "QUERY_HEADS": 32, "BLOCK": 128, "PER_HEAD": False}
    for _ in range(2):
        launching.launch(importance.mean_kernel, (5, 1), *given, constants, num_warps=2)
    by_the_jit, by_the_launcher = handed
    assert by_the_jit[1:4] == (5, 1, 1)
    assert any(value is mass for value in by_the_jit)
    assert len(by_the_jit) == len(by_the_launcher)
    assert all(left is right or left == right for left, right in zip(*handed, strict=True))


@pytest.mark.parametrize("target", NVIDIA)
def test_programs_wait_before_they_load_what_others_wrote(target: str) -> None:
    """On every path: a compiler that moves loads, as one that loads ahead in a loop does, could move them before."""
    waiting = 0
    for kernel, case in kernels(target).items():
        program = ptx_paths.Program(kernel.asm["ptx"])
        if program.find(ptx_paths.is_wait):
            waiting += 1
            assert program.find(lambda line: "ld.global.cg" in line), case
            assert ptx_paths.loads_without_waiting(kernel.asm["ptx"]) == [], case
    assert waiting == sum(row.kernel == "prune_kernel" for row in compiled(target))


def test_the_programs_that_time_a_hand_over_wait_for_each_other() -> None:
    """The GPU check's own kernel, which no CPU can run: its two programs have to be there at once."""
    from bench.steps.ping_pong import ping_pong_kernel  # not on the path of `make kernel-table`

    counter = torch.zeros(64, dtype=torch.int32)
    start = partial(ping_pong_kernel[(2,)], counter, 10, 32, num_warps=4, launch_cooperative_grid=True)
    ((_, kernel, *_),) = launched_by([start], "sm_90")
    assert kernel.metadata.launch_cooperative_grid
    assert kernel.asm["ptx"].count("ld.global.gpu.acquire") == kernel.asm["ptx"].count("atom.global") == 2


@pytest.mark.parametrize("target", [target for target in NVIDIA if target != ENTRIES_ONLY])
def test_the_next_tile_is_asked_for_while_one_is_in_use(target: str) -> None:
    """Two buffers of keys in every first pass, where vectors are read whole: with one the loop waits for each tile."""
    passes = 0
    for kernel, case in kernels(target).items():
        swept = re.findall(r"ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x128x64xb?f16", kernel.asm["ttgir"])
        if kernel.metadata.name == "row_lse_kernel" or (
            "prune" in kernel.metadata.name and ", lse" not in case
        ):
            assert set(swept) <= {"2"}, case
            passes += bool(swept)
    assert passes


@pytest.mark.parametrize("target", [target for target in TARGETS if target != ENTRIES_ONLY])
def test_keys_are_read_once_for_all_rows(target: str) -> None:
    """Of many rows, tiles go by; the tile of keys that they share was loaded before."""
    swept = 0
    for kernel, case in kernels(target).items():
        if kernel.metadata.name == "visual_mass_kernel" and case.startswith("Qwen2.5-VL, bfloat16"):
            before, _, loop = kernel.asm["ttgir"].partition("scf.for")
            loads = r"(?:tt\.load|async_copy_global_to_local|buffer_load)[^\n]*tensor<128x64x"
            assert len(re.findall(loads, before)) == 1, case
            assert not re.findall(loads, loop), case
            swept += 1
    assert swept == 2


@pytest.mark.parametrize("target", [target for target in NVIDIA if target != ENTRIES_ONLY])
def test_rows_are_loaded_before_any_is_stored(target: str) -> None:
    """Or each load would wait for the store before it, which may be to the same address for all the compiler knows."""
    copying = 0
    for kernel, case in kernels(target).items():
        if kernel.metadata.name == "gather_rows_kernel":
            assert ptx_paths.loads_after_stores(kernel.asm["ptx"]) == [[]], case
            copying += 1
        elif kernel.metadata.name == "prune_kernel":
            # Behind one of its waits: the other roles do read after they have written.
            assert [] in ptx_paths.loads_after_stores(kernel.asm["ptx"], ptx_paths.is_wait), case
            copying += 1
    assert copying


def test_the_table_is_of_a_compiler_that_spills_nothing() -> None:
    assert json.loads(TABLE.read_text(encoding="utf-8"))["triton"] in WITHOUT_SPILLS


@pytest.mark.parametrize("target", TARGETS)
def test_table_is_what_the_compiler_gives(target: str) -> None:
    results = json.loads(TABLE.read_text(encoding="utf-8"))
    if triton.__version__ != results["triton"]:
        pytest.skip(f"the table was made with triton {results['triton']}, this is {triton.__version__}")
    rows = [Row(**row) for row in results["rows"] if row["target"] == target]
    assert rows == compiled(target), "run `make kernel-table`"


def write_table() -> None:
    """Write what the installed compiler gives, a row to a line."""
    rows = [json.dumps(asdict(row)) for target in TARGETS for row in compiled(target)]
    text = f'{{"triton": "{triton.__version__}", "rows": [\n' + ",\n".join(rows) + "\n]}\n"
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_table()
