"""Instructions of a CPU that a prefill and a decode step take, counted by valgrind's callgrind: repeatable to 0.2%.

Times of a step that takes a few milliseconds swing by more than what the hooks cost; counts don't. They are the measure
of what is added on the host. ``python -m bench.instructions`` runs itself under valgrind and takes some minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 10
"""Decode steps that are counted together."""
COUNTING = "GAP_TRITON_COUNTING"  # set in the process that runs under valgrind
CONFIGS: dict[str, dict[str, Any]] = {
    "in the decoder": {"keep": 0.25, "layer": 2},
    "before the decoder": {"keep": 0.25, "layer": -1, "score": "cls"},
}
GOALS = {"pruned": ("oracle", 1.02), "attached": ("sdpa", 1.005)}
"""Instructions of a decode step, at most, as a multiple of another variant's."""


def count_under_valgrind(configs: list[str], static: bool) -> list[dict[str, str]]:
    """Run what is counted; valgrind counts between two calls of torch's toggle. Returns what each dump is of.

    Args:
        configs: Which of `CONFIGS`.
        static: Whether KV caches are static.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from gap_triton import GapConfig
    from gap_triton.demo.architectures import LLAVA
    from gap_triton.demo.grounding import prepare
    from gap_triton.demo.scenes import held_out
    from gap_triton.latency import Subject, variants_of

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(LLAVA.folder, attn_implementation="sdpa").eval()
    inputs = dict(prepare(LLAVA.load_processor(LLAVA.folder), held_out(1)))
    dumps = []
    gc.disable()  # Python looks for circles every so many objects, in whatever step that happens to be
    for name in configs:
        arguments = CONFIGS[name]
        variants = variants_of(
            Subject("embedded", model, inputs, 64), GapConfig(**arguments), steps=4 * STEPS, static=static
        )
        for variant in variants:
            for _ in range(2):  # the second is counted: what is cached is there then
                variant.prefill()
                for _ in range(3):
                    variant.decode()
            torch._C._valgrind_toggle()
            variant.prefill()
            torch._C._valgrind_toggle_and_dump_stats()
            dumps.append({"config": name, "variant": variant.name, "what": "prefill"})
            for _ in range(3):
                variant.decode()
            torch._C._valgrind_toggle()
            for _ in range(STEPS):
                variant.decode()
            torch._C._valgrind_toggle_and_dump_stats()
            dumps.append({"config": name, "variant": variant.name, "what": "decode"})
    return dumps


def instructions_of(dump: Path) -> int:
    """The total of a callgrind file."""
    found = re.search(r"^(?:totals|summary): (\d+)", dump.read_text(errors="replace"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{dump} holds no total")
    return int(found[1])


def run_valgrind(folder: Path, arguments: list[str]) -> list[dict[str, object]]:
    """Run this file under valgrind; returns the dumps with their ``instructions``, of one prefill or one step."""
    listing = folder / "dumps.json"
    command = [
        "valgrind", "--tool=callgrind", f"--callgrind-out-file={folder / 'callgrind.out'}", "--collect-atstart=no",
        sys.executable, "-m", "bench.instructions", *arguments,
    ]  # fmt: skip
    finished = subprocess.run(
        command,
        env=os.environ | {COUNTING: str(listing), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode or not listing.exists():
        raise RuntimeError(f"valgrind ended with {finished.returncode}: {finished.stderr[-2000:]}")
    dumps = json.loads(listing.read_text())
    for number, dump in enumerate(dumps, 1):
        total = instructions_of(folder / f"callgrind.out.{number}")
        dump["instructions"] = total // (STEPS if dump["what"] == "decode" else 1)
    return dumps


def table(dumps: list[dict[str, object]]) -> str:
    """Millions of instructions by variant, with those over the oracle's and over those without pruning."""
    lines = [f"{'':22}{'':10}{'prefill':>12}{'a step':>10}{'of oracle':>12}{'of sdpa':>10}"]
    by = {(each["config"], each["variant"], each["what"]): int(str(each["instructions"])) for each in dumps}
    for config in dict.fromkeys(str(each["config"]) for each in dumps):
        for variant in ("sdpa", "attached", "pruned", "oracle"):
            prefill, step = by[config, variant, "prefill"], by[config, variant, "decode"]
            of = [step / by[config, other, "decode"] - 1 for other in ("oracle", "sdpa")]
            lines.append(
                f"{config:22}{variant:10}{prefill / 1e6:11.1f}M{step / 1e6:9.2f}M"
                + "".join(f"{x:+11.1%}" for x in of)
            )
        for variant, (other, most) in GOALS.items():
            if by[config, variant, "decode"] > most * by[config, other, "decode"]:
                lines.append(
                    f"{config}, {variant}: a step is to have at most {most - 1:.1%} more than {other}"
                )
    return "\n".join(lines)


def main() -> int:
    """Count, print and write; 2 where there is no valgrind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", choices=CONFIGS, action="append", help="only this one; may be given again"
    )
    parser.add_argument("--static", action="store_true", help="static KV caches")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    configs = options.config or list(CONFIGS)
    if COUNTING in os.environ:
        Path(os.environ[COUNTING]).write_text(json.dumps(count_under_valgrind(configs, options.static)))
        return 0
    if shutil.which("valgrind") is None:
        print(
            "instructions are counted by valgrind, and it is not installed: apt install valgrind",
            file=sys.stderr,
        )
        return 2
    print("counting under valgrind, which takes some minutes ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        asked = [f"--config={name}" for name in configs] + ["--static"] * options.static
        dumps = run_valgrind(Path(folder), asked)
    print(table(dumps))
    if options.output is not None:
        options.output.write_text(json.dumps(dumps, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
