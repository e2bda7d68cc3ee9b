"""What `gap-triton bench --graph` captures, prefills and decode steps on static caches: held against eager calls, timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gap_triton
from bench import cuda
from bench.outcome import Found, StepFailed
from bench.steps.settings import Settings
from gap_triton.latency import Subject, measure, random_subject, variants_of
from gap_triton.latency.graphs import captured_variants
from gap_triton.latency.measure import WrongLogits, check_all
from gap_triton.latency.report import rows_of

CONFIG = gap_triton.GapConfig(keep=0.25)
ROUNDS, STEPS = 10, 32


def subject_on(device: torch.device, dtype: torch.dtype) -> Subject:
    """The model whose steps are bound by the host, and gain most."""
    return random_subject("smol", visual_tokens=None, batch=1, device=device, dtype=dtype)


def replay_models(settings: Settings) -> Iterator[Found]:
    """Replay on another prompt than was captured, and compare with the oracle; then time all variants in turn."""
    cuda.require_cuda(settings.device, "a CUDA graph")
    subject = subject_on(settings.device, settings.dtype)
    variants = variants_of(subject, CONFIG, steps=STEPS + 8)
    variants += captured_variants(subject, CONFIG, steps=STEPS + 8)
    try:
        yield {"model": subject.name, "error": check_all(variants)}
    except WrongLogits as error:
        raise StepFailed(str(error)) from error
    for row in rows_of(measure(variants, rounds=ROUNDS, steps=STEPS, device=settings.device)):
        yield {name: value for name, value in row.items() if not name.endswith("_values")}
