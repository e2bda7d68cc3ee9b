"""How kernels divide their work on each class of GPU: tile sizes, warps, and stages of the pipeline of loads.

Nothing here was timed. What stands here was chosen by what the compiler makes of it, in this order:

1. nothing spilled, and no more shared memory than a program can have: 64 KiB on gfx942, 99 on sm_86 and sm_120, 163 on
   sm_80, 227 on sm_90 and sm_100;
2. no work done twice: eight warps of 16 rows want 128 rows. On sm_90 two warpgroups compute the same tile otherwise, and
   before it the warps of a short tile divide its columns, so that each row's maximum and sum cross them;
3. wide instructions of tensor cores: a tile that goes by of 64 columns rather than 16 or 32;
4. loads ahead: a third stage where shared memory is left over, as the registers allow one program anyway.

Of importance and of pruning in one launch, several programs share a multiprocessor: what counts there is that two or three
fit, and that loads overlap within the shared memory of one.

An entry of another kernel is one more table and one more function here. ``tests/scripts/kernels_aot.py`` compiles every
entry for its GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch


class Tiles(NamedTuple):
    """How one kernel divides its work."""

    rows: int
    """Of the tile that stays while a program walks: query rows, keys that receive, or anchors."""
    columns: int
    """Of the tile that goes by."""
    warps: int
    """Of a program."""
    stages: int
    """Of the pipeline of loads; 1 = none is made ahead."""
    part: int = 256
    """Elements of each vector that are read at a time, unless it has fewer."""
    registers: int | None = None
    """Of a thread at most, which NVIDIA's compiler is told; None: it chooses."""
    register_level: int | None = None
    """How many registers NVIDIA's assembler spends to run ahead, 0 to 10; None: as it does untold, 5."""

    def options(self) -> dict[str, Any]:
        """Return what the compiler is told beside the tile sizes."""
        told: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None:
            told["maxnreg"] = self.registers
        if self.register_level is not None:
            told["ptx_options"] = f"--register-usage-level={self.register_level}"
        return told


class ByLength(NamedTuple):
    """Tiles by the length of the vectors that are multiplied."""

    short: Tiles
    """Up to 64."""
    odd: Tiles
    """65 to 127, no multiple of 16, such as 72: every element is loaded by itself, and its pointers take registers."""
    padded: Tiles
    """Other multiples of 16 up to 112, such as 80: read as 128 behind a mask, which takes registers, too."""
    full: Tiles
    """128."""
    long: Tiles
    """129 to 256."""

    def of(self, length: int) -> Tiles:
        """Return those for one length."""
        if length <= 64:
            return self.short
        if length < 128:
            return self.odd if length % 16 else self.padded
        return self.full if length == 128 else self.long


OTHER = "other"
"""Any GPU that has no entries of its own, and the interpreter."""

ATTENTION = {
    "sm_80": ByLength(
        short=Tiles(128, 64, 8, 3),
        odd=Tiles(64, 64, 8, 2),
        padded=Tiles(128, 32, 8, 3),
        # Nearly all registers are needed: left alone, the assembler runs so far ahead that a few values are spilled.
        full=Tiles(128, 64, 8, 3, register_level=3),
        long=Tiles(64, 32, 8, 2),
    ),
    "sm_86": ByLength(
        short=Tiles(128, 64, 8, 3),
        odd=Tiles(64, 64, 8, 2),
        padded=Tiles(128, 32, 8, 2),
        full=Tiles(128, 64, 8, 3),
        long=Tiles(64, 32, 8, 2),
    ),
    "sm_90": ByLength(
        short=Tiles(128, 64, 8, 3),
        odd=Tiles(128, 32, 8, 2),
        padded=Tiles(128, 64, 8, 3),
        full=Tiles(128, 64, 8, 3),
        long=Tiles(128, 32, 8, 2),
    ),
    "sm_100": ByLength(
        short=Tiles(128, 64, 8, 3),
        odd=Tiles(128, 32, 8, 2),
        padded=Tiles(128, 64, 8, 3),
        full=Tiles(128, 64, 8, 3),
        long=Tiles(128, 32, 8, 2),
    ),
    "sm_120": ByLength(
        short=Tiles(128, 64, 8, 3),
        odd=Tiles(64, 64, 8, 2),
        padded=Tiles(128, 32, 8, 2),
        full=Tiles(128, 64, 8, 3),
        long=Tiles(64, 32, 8, 2),
    ),
    "gfx942": ByLength(
        short=Tiles(128, 64, 4, 2),
        odd=Tiles(128, 32, 8, 2),
        padded=Tiles(128, 32, 4, 2),
        full=Tiles(128, 32, 4, 2),
        long=Tiles(64, 32, 8, 2),
    ),
    OTHER: ByLength(
        short=Tiles(64, 64, 4, 2),
        odd=Tiles(64, 64, 8, 2),
        padded=Tiles(64, 32, 4, 2),
        full=Tiles(64, 32, 4, 2),
        long=Tiles(64, 32, 8, 2),
    ),
}
"""The rows are queries, the columns keys."""

# Two programs fit a multiprocessor. Told so, NVIDIA's compiler uses the registers; left alone it spills to fit more.
_MANY_WARPS = Tiles(64, 32, 8, 2, registers=128)
_FEW_WARPS = Tiles(64, 64, 4, 2)

RECEIVED = {
    "sm_80": ByLength(
        short=_FEW_WARPS, odd=_MANY_WARPS, padded=_FEW_WARPS, full=_FEW_WARPS, long=_MANY_WARPS
    ),
    "sm_86": ByLength(
        short=_FEW_WARPS, odd=_MANY_WARPS, padded=_FEW_WARPS, full=_FEW_WARPS, long=_MANY_WARPS
    ),
    "sm_90": ByLength(
        short=_FEW_WARPS, odd=_MANY_WARPS, padded=_FEW_WARPS, full=_FEW_WARPS, long=_MANY_WARPS
    ),
    # A product comes from tensor memory in as many registers as it has values of a thread: (64, 64) is too much.
    "sm_100": ByLength(
        short=_MANY_WARPS, odd=_MANY_WARPS, padded=_MANY_WARPS, full=_MANY_WARPS, long=_MANY_WARPS
    ),
    "sm_120": ByLength(
        short=_FEW_WARPS, odd=_MANY_WARPS, padded=_FEW_WARPS, full=_FEW_WARPS, long=_MANY_WARPS
    ),
    "gfx942": ByLength(
        short=_FEW_WARPS, odd=_FEW_WARPS, padded=_FEW_WARPS, full=_FEW_WARPS, long=_MANY_WARPS
    ),
    OTHER: ByLength(
        short=_MANY_WARPS, odd=_MANY_WARPS, padded=_MANY_WARPS, full=_MANY_WARPS, long=_MANY_WARPS
    ),
}
"""Rows that stay in the first sweep, keys that stay in the second."""

# Vectors whose length is no power of two are read behind a mask, which takes registers.
_SWEEP = ByLength(
    short=Tiles(32, 64, 4, 3),
    odd=Tiles(32, 32, 4, 3),
    padded=Tiles(32, 32, 4, 3),
    full=Tiles(32, 64, 4, 3),
    long=Tiles(32, 32, 4, 3),
)
# One buffer: the next tile waits in registers, and another would take so many that fewer programs run.
_SWEEP_OF_TWO_STAGES = ByLength(*[tiles._replace(stages=2) for tiles in _SWEEP])

IMPORTANCE = {
    "sm_80": _SWEEP,
    "sm_86": _SWEEP,
    "sm_90": _SWEEP,
    "sm_100": _SWEEP,
    "sm_120": _SWEEP,
    "gfx942": _SWEEP_OF_TWO_STAGES,
    OTHER: _SWEEP_OF_TWO_STAGES,
}
"""Query rows of a key head, 16 where there are no more; columns are keys. Stages at most, see ``importance/kernel.py``."""

FEW_ROWS = 16
"""What an instruction of tensor cores takes."""

# Float32 is not for tensor cores: its operands stay in registers, which hold a part of each vector only.
IMPORTANCE_FLOAT32 = ByLength(*[Tiles(16, 32, 4, 3, part=16)] * 4, *[Tiles(16, 16, 4, 3, part=16)])
# Loads ahead go by way of shared memory, which leaves registers for another program; of long vectors, it takes too much.
ATTENTION_FLOAT32 = ByLength(
    short=Tiles(32, 16, 4, 2, part=16, registers=128),
    odd=Tiles(16, 16, 4, 2, part=16, register_level=3),
    padded=Tiles(16, 16, 4, 2, part=16),
    full=Tiles(16, 16, 4, 2, part=16),
    long=Tiles(16, 16, 4, 1, part=16),
)
RECEIVED_FLOAT32 = Tiles(16, 16, 2, 1, part=16)

CORRECTED = Tiles(32, 32, 4, 1, part=64)
CORRECTED_FLOAT32 = Tiles(16, 16, 4, 1, part=16)
"""Query rows of one head, 16 where there are no more; columns are visual tokens. Both products are at hand at once."""

PRUNE_WARPS = 8
PRUNE_REGISTERS = 120
"""Of a thread. Told so, the compiler uses them; left alone it spills a few values to fit one more program."""

SPATIAL_WEIGHTS = Tiles(16, 64, 4, 3, part=128)
SPATIAL_WEIGHTS_FLOAT32 = Tiles(16, 16, 4, 2, part=16)
SPATIAL_AGGREGATE = Tiles(16, 64, 8, 3, part=128)
SPATIAL_AGGREGATE_FLOAT32 = Tiles(16, 16, 4, 2, part=64)

COLLECT = Tiles(1, 16, 4, 1, part=128)
"""Of one token: the columns are those that it takes in."""


def attention(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Return the tiles of ``attention_kernel``."""
    table = ATTENTION_FLOAT32 if dtype == torch.float32 else ATTENTION[architecture(device)]
    return table.of(head_dim)


def received(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Return the tiles of ``token_lse_kernel`` and ``received_mass_kernel``."""
    return RECEIVED_FLOAT32 if dtype == torch.float32 else RECEIVED[architecture(device)].of(head_dim)


def importance(head_dim: int, num_rows: int, dtype: torch.dtype, device_class: str) -> Tiles:
    """Return the tiles of ``row_lse_kernel`` and ``visual_mass_kernel`` for M = ``num_rows`` rows of a head of the grid."""
    table = IMPORTANCE_FLOAT32 if dtype == torch.float32 else IMPORTANCE[device_class]
    # A short vector behind a mask takes as many registers as an odd one: at 40 elements, 161 where 144 leave room for three.
    chosen = table.odd if head_dim < 64 and head_dim not in (16, 32) else table.of(head_dim)
    return chosen._replace(rows=FEW_ROWS) if num_rows <= FEW_ROWS else chosen


def corrected(num_rows: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles of ``corrected_mass_kernel`` for so many rows."""
    chosen = CORRECTED_FLOAT32 if dtype == torch.float32 else CORRECTED
    return chosen._replace(rows=FEW_ROWS) if num_rows <= FEW_ROWS else chosen


def prune(head_dim: int, num_rows: int, dtype: torch.dtype, device_class: str) -> Tiles:
    """Return the tiles of ``prune_kernel``: those of importance, with the warps that copying and selecting want."""
    chosen = importance(head_dim, num_rows, dtype, device_class)
    return chosen._replace(warps=PRUNE_WARPS, registers=PRUNE_REGISTERS)


def spatial_weights(dtype: torch.dtype) -> Tiles:
    """Return the tiles of ``spatial_weights_kernel``."""
    return SPATIAL_WEIGHTS_FLOAT32 if dtype == torch.float32 else SPATIAL_WEIGHTS


def spatial_aggregate(dtype: torch.dtype) -> Tiles:
    """Return the tiles of ``spatial_aggregate_kernel``."""
    return SPATIAL_AGGREGATE_FLOAT32 if dtype == torch.float32 else SPATIAL_AGGREGATE


@functools.cache
def architecture(device: torch.device) -> str:
    """Return the class of GPU that a device is: a key of the tables. Asks the driver once, and waits for nothing."""
    if device.type != "cuda":
        return OTHER
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return name if name in ATTENTION else OTHER
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"  # Ada's 8.9 has the shared memory of 8.6
    return name if (name := f"sm_{major}0") in ATTENTION else OTHER
