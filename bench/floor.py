"""The least time that an operator could take: bytes over copy bandwidth, or operations over matrix rate, plus a launch.

Bandwidth, rate and launch are measured in the run that uses them; bytes and operations are counted here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench import cuda, timing
from bench.operators import RADIUS_OF_SIDE
from bench.shapes import ANCHOR_EVERY, Case

ID_BYTES = 8  # indices and position ids are int64
SCORE_BYTES = 4  # scores and log-sum-exp are float32
NEIGHBOUR_BYTES = 4
PILLAR_BYTES = 1


@dataclass(frozen=True)
class Work:
    """What one call can't avoid: each input byte read once, each output byte written once, and its operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do.

    Attributes:
        bytes_per_us: A large copy, bytes read plus bytes written.
        flops_per_us: A large square matrix product in the dtype that is benchmarked.
        launch_us: One launch of the smallest kernel there is in PyTorch, by mode (``"eager"``, ``"graph"``).
    """

    bytes_per_us: float
    flops_per_us: float
    launch_us: dict[str, float]

    def floor_us(self, work: Work, mode: str) -> float:
        """The least time of a call in ``mode``, in microseconds."""
        return max(work.bytes / self.bytes_per_us, work.flops / self.flops_per_us) + self.launch_us[mode]


def topk_work(case: Case, dtype: torch.dtype) -> Work:
    """Scores read, indices written."""
    shape, batch = case.shape, case.batch
    return Work(batch * (shape.visual * SCORE_BYTES + shape.keep * ID_BYTES), 0)


def importance_work(case: Case, dtype: torch.dtype, rows: int, lse: bool = False) -> Work:
    """Query rows, their indices (none for the last row alone), keys and visual indices read; scores written.

    All keys count, since the softmax needs them; with the log-sum-exp given, the visual ones.
    """
    shape, batch = case.shape, case.batch
    keys = shape.visual if lse else shape.tokens
    vectors = (shape.query_heads * rows + shape.key_heads * keys) * shape.head_dim * dtype.itemsize
    lse_bytes = shape.query_heads * rows * SCORE_BYTES if lse else 0
    indices = (shape.visual + (rows if rows > 1 else 0)) * ID_BYTES
    moved = vectors + lse_bytes + indices + shape.visual * SCORE_BYTES
    return Work(batch * moved, batch * 2 * shape.query_heads * rows * keys * shape.head_dim)


def prune_work(case: Case, dtype: torch.dtype, rows: int = 1) -> Work:
    """Importance of the last rows; surviving rows of hidden states, cos, sin and ids, read and written; index written."""
    shape, batch = case.shape, case.batch
    scoring = importance_work(case, dtype, rows)
    row = (shape.channels + 2 * shape.head_dim) * dtype.itemsize + shape.axes * ID_BYTES
    return Work(scoring.bytes + batch * shape.length * (2 * row + ID_BYTES), scoring.flops)


def attention_work(case: Case, dtype: torch.dtype, importance: bool = False) -> Work:
    """Queries, keys and values read, output and log-sum-exp written; half of the two S x S products (causal).

    Importance adds its indices and scores, and one product of text rows and visual keys; both are in the cache by then,
    so their bytes aren't counted again.
    """
    shape, batch = case.shape, case.batch
    vectors = 2 * (shape.query_heads + shape.key_heads) * shape.tokens * shape.head_dim * dtype.itemsize
    moved = vectors + shape.query_heads * shape.tokens * SCORE_BYTES
    products = 2 * shape.query_heads * shape.tokens**2 * shape.head_dim
    if importance:
        moved += (shape.text + shape.visual) * ID_BYTES + shape.visual * SCORE_BYTES
        products += 2 * shape.query_heads * shape.text * shape.visual * shape.head_dim
    return Work(batch * moved, batch * products)


def received_work(case: Case, dtype: torch.dtype) -> Work:
    """Queries and keys read, scores written; one S x S product for the log-sum-exp and one for the sums."""
    shape, batch = case.shape, case.batch
    vectors = (shape.query_heads + shape.key_heads) * shape.tokens * shape.head_dim * dtype.itemsize
    products = 4 * shape.query_heads * shape.tokens**2 * shape.head_dim
    return Work(batch * (vectors + shape.tokens * SCORE_BYTES), batch * products)


def region_work(case: Case, dtype: torch.dtype) -> Work:
    """Scores of the patches and, once for all samples, three neighbours of each read; indices written."""
    patches, batch = case.shape.side**2, case.batch
    moved = batch * (patches * SCORE_BYTES + case.shape.keep * ID_BYTES) + patches * 3 * NEIGHBOUR_BYTES
    return Work(moved, 0)


def aggregate_work(case: Case, dtype: torch.dtype) -> Work:
    """Features, what they are compared by, and anchors read, anchors' rows written; cosines and sums within the radius.

    Pillars collect nothing, so what is near them costs no operations.
    """
    shape, batch = case.shape, case.batch
    row = (shape.query_heads + shape.key_heads) * shape.head_dim
    patch = torch.arange(shape.side**2)
    anchors = patch[::ANCHOR_EVERY]
    collector = anchors[anchors % 2 == 1, None]
    down, right = patch // shape.side - collector // shape.side, patch % shape.side - collector % shape.side
    near = down.square() + right.square() < (RADIUS_OF_SIDE * shape.side) ** 2
    moved = len(patch) * row * dtype.itemsize + len(anchors) * (
        ID_BYTES + PILLAR_BYTES + shape.query_heads * shape.head_dim * dtype.itemsize
    )
    return Work(batch * moved, batch * 2 * int(near.sum()) * row)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure copy bandwidth, matrix rate and launch, on random data."""
    on_cuda = cuda.is_cuda(device)
    copied, side = (2**30, 8192) if on_cuda else (2**26, 512)
    cell = torch.zeros(1, device=device)
    launch = {"eager": _median(cell.zero_, device)}
    if on_cuda:
        launch["graph"] = timing.quantiles(timing.graph([cell.zero_], device)).median
    return Rates(
        2 * copied / _copy_us(copied, device), 2 * side**3 / _product_us(side, dtype, device), launch
    )


def _median(function: timing.Function, device: torch.device) -> float:
    return timing.quantiles(timing.eager([function], device)).median


def _copy_us(size: int, device: torch.device) -> float:
    """Time to copy ``size`` bytes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _median(lambda: target.copy_(source), device)


def _product_us(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Time of a product of two square matrices."""
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    return _median(lambda: left @ right, device)
