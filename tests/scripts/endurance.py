"""Many generations in one process: ``make endurance``, or ``python tests/scripts/endurance.py [--generations N]``.

Presets, caches and ways to switch on change all the time, and some calls fail on purpose. What the process holds afterwards
must be what it held after the first round: memory, tensors, hooks. Exit status 1 if anything grew.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from rich.progress import track  # noqa: E402
from support.methods import NAMES, method  # noqa: E402
from support.tiny import LAYERS, generate  # noqa: E402
from support.ways import MODELS, MROPE, build, make  # noqa: E402

import gap_triton  # noqa: E402
from gap_triton.arguments import CACHE  # noqa: E402

BATCHES = ("single", "left-padded", "ragged-images")
ALLOWED_GROWTH = 16 * 2**20  # bytes: what allocators keep varies by a few MiB from round to round


def dynamic(model: transformers.PreTrainedModel) -> dict[str, object]:
    return {CACHE: transformers.DynamicCache(config=model.config.get_text_config())}


def static(model: transformers.PreTrainedModel) -> dict[str, object]:
    return {CACHE: gap_triton.static_cache(model, max_cache_len=200)}


def without(model: transformers.PreTrainedModel) -> dict[str, object]:
    return {"use_cache": False}


CACHES: tuple[Callable[[transformers.PreTrainedModel], dict[str, object]], ...] = (dynamic, static, without)


def held(models: list[transformers.PreTrainedModel]) -> dict[str, int]:
    """What this process holds: bytes, tensors and hooks."""
    gc.collect()
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        "resident bytes": psutil.Process().memory_info().rss,
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "hooks": sum(len(getattr(m, name)) for model in models for m in model.modules() for name in hooks),
        "threads": threading.active_count(),
    }


def run(models: list[transformers.PreTrainedModel]) -> Iterator[None]:
    """Generations without end, one after the other."""
    work = itertools.product(BATCHES, CACHES, NAMES, zip(MODELS, models, strict=True))
    for number, (batch, cache, name, (kind, model)) in enumerate(itertools.cycle(work)):
        config = method(name, LAYERS, cls=kind != MROPE)
        inputs = make(kind, batch, seed=number % 7)
        if number % 3 == 0:
            gap_triton.attach(model, config)
            generate(model, inputs, tokens=2, **cache(model))
            gap_triton.detach(model)
        elif number % 3 == 1:
            with gap_triton.pruning(model, config):
                generate(model, inputs, tokens=2, **cache(model))
        else:
            model.set_attn_implementation({"text_config": "gap_triton"})
            gap_triton.configure(model, config)
            fail(model, inputs)
            generate(model, inputs, tokens=2, **cache(model))
            model.set_attn_implementation({"text_config": "sdpa"})
        yield


class OnPurpose(Exception):
    """What `fail` raises."""


def fail(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Break a forward off in the middle of the decoder."""

    def stop(*_: object) -> None:
        raise OnPurpose

    handle = model.model.language_model.layers[-1].register_forward_pre_hook(stop)
    with contextlib.suppress(OnPurpose):
        generate(model, inputs, tokens=1)
    handle.remove()


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What there is more of ``after``, as sentences."""
    return [
        f"{what} grew from {before[what]:,} to {after[what]:,}"
        for what in before
        if after[what] - before[what] > (ALLOWED_GROWTH if what == "resident bytes" else 0)
    ]


def main() -> int:
    """Run, and say what was held at the start and at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--generations", type=int, default=1500, metavar="N", help="default: %(default)s")
    generations = parser.parse_args().generations
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    models = [build(name) for name in MODELS]
    # A fifth of it fills what is filled once: memo tables, allocators, the parameters of every preset.
    warm_up = max(generations // 5, 1)
    calls = run(models)
    for _ in track(range(warm_up), description="warm-up"):
        next(calls)
    before = held(models)
    for _ in track(range(generations - warm_up), description="endurance"):
        next(calls)
    after = held(models)
    for what in before:
        print(f"{what}: {before[what]:,} after {warm_up} generations, {after[what]:,} after {generations}")
    problems = grown(before, after)
    print("; ".join(problems) or "nothing grew")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
