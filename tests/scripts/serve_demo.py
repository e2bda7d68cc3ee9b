"""Serve the embedded model with vLLM, and ask it the demo's questions through the OpenAI API: ``make serve-demo``.

One server answers all: what it keeps of an image by default, and what requests ask for instead.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from gap_triton.demo.architectures import LLAVA
from gap_triton.demo.grounding import box_iou, boxes_from_tokens
from gap_triton.demo.scenes import IMAGE_SIZE, Scenes, held_out

ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# What the server says of pruning, one line for each image size and number of survivors.
OF_OURS = re.compile(r"gap_triton[ :].*")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
BY_DEFAULT = {"keep": 0.5, "score": "cls"}
STARTS_WITHIN = 600  # seconds
AT_ONCE = 8
HIT = 0.5  # intersection over union that counts as right


@dataclass(frozen=True)
class Way:
    """What is asked for beside the questions."""

    name: str
    options: dict[str, Any]


WAYS = (
    Way("everything", {"gap_keep": 1.0}),
    Way("a half, its own ids (GAP): the server's default", {}),
    Way("a half, ids compacted", {"gap_ids": "compacted"}),
    Way("a quarter, its own ids (GAP)", {"gap_keep": 0.25}),
    Way("a quarter, ids compacted", {"gap_keep": 0.25, "gap_ids": "compacted"}),
)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def command(port: int, template: Path) -> list[str]:
    """The command that starts the server."""
    overrides = {"architectures": ["GapLlavaForConditionalGeneration"], "gap": BY_DEFAULT}
    # `vllm serve` asks for a distribution of the name vllm, which vllm-cpu is not.
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(LLAVA.folder), "--served-model-name", "embedded"),
        *("--hf-overrides", json.dumps(overrides), "--trust-request-mm-kwargs"),
        *("--chat-template", str(template), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port)),
    ]


@contextmanager
def server(progress: Progress, log: Path) -> Iterator[str]:
    """A running server; its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    template = log.with_name("template.jinja")
    template.write_text(TEMPLATE, encoding="utf-8")
    task = progress.add_task("the server loads the model", total=None)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command(port, template), env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        _wait(process, address, log)
        progress.update(task, total=1, completed=1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(STARTS_WITHIN):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1)
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            try:
                status = process.wait(1)
            except subprocess.TimeoutExpired:
                continue
            raise SystemExit(f"the server ended with {status}:\n{log.read_text()[-4000:]}") from None
    raise SystemExit(f"the server has not started in {STARTS_WITHIN} s:\n{log.read_text()[-4000:]}")


def data_url(scenes: Scenes, index: int) -> str:
    """A scene as a PNG inside of a URL."""
    png = io.BytesIO()
    scenes.image(index).save(png, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def ask(client: OpenAI, scenes: Scenes, index: int, way: Way) -> tuple[str, int]:
    """Ask about one scene; the answer, and how many tokens the prompt had."""
    content: Any = [
        {"type": "image_url", "image_url": {"url": data_url(scenes, index)}},
        {"type": "text", "text": scenes.question(index)},
    ]
    answer = client.chat.completions.create(
        model="embedded",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=8,
        extra_body={"mm_processor_kwargs": way.options} if way.options else {},
    )
    assert answer.usage is not None
    return answer.choices[0].message.content or "", answer.usage.prompt_tokens


def accuracy(scenes: Scenes, answers: Sequence[str]) -> float:
    """Share of the scenes whose box was found."""
    found = box_iou(boxes_from_tokens(answers), scenes.target_boxes / IMAGE_SIZE) >= HIT
    return float(found.float().mean())


def main() -> None:
    """Start, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=128, help="held-out scenes to ask about (128)")
    scenes = held_out(parser.parse_args().scenes)
    console = Console(width=110)
    columns = (TextColumn("{task.description:<50}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    table = Table("kept of an image", "prompt tokens", "accuracy")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        with (
            Progress(SpinnerColumn(), *columns, console=console) as progress,
            server(progress, log) as address,
        ):
            client = OpenAI(base_url=f"{address}/v1", api_key="none")
            for way in WAYS:
                task = progress.add_task(way.name, total=len(scenes))
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    jobs = [pool.submit(ask, client, scenes, i, way) for i in range(len(scenes))]
                    answers = []
                    for job in jobs:
                        answers.append(job.result())
                        progress.advance(task)
                texts, tokens = zip(*answers, strict=True)
                table.add_row(way.name, str(max(tokens)), f"{accuracy(scenes, texts):.3f}")
        said = dict.fromkeys(match[0] for match in OF_OURS.finditer(log.read_text(encoding="utf-8")))
    console.print(f"{len(scenes)} held-out scenes, asked through the OpenAI API, {AT_ONCE} at a time")
    console.print(table)
    console.print("The server's log:")
    for line in said:
        if line.startswith(("gap_triton prunes", "gap_triton: an image")):
            console.print(f"  {line}", highlight=False)


if __name__ == "__main__":
    main()
