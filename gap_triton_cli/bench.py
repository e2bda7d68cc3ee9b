"""``gap-triton bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from .choices import Dtype
from .console import console
from .options import Keep, Layer, Method, Revision, ScoreName, TrustRemoteCode, pruning_of
from .parse import open_image
from .refuse import told_as_option

Device = Literal["cuda", "cpu"]
CacheKind = Literal["dynamic", "static"]
Config = Literal["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "smol"]


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a vision-language model, 'embedded' or 'embedded-mrope'."),
    ] = None,
    config: Annotated[
        Config | None,
        typer.Option(help="Instead of --model: random weights in these sizes. smol runs on any CPU."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="With --model: what to read. Default: noise, 336 x 336."
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="With --model: what to ask.")] = "Where is the object?",
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --config: visual tokens of a sample, a square number.")
    ] = None,
    method: Method = None,
    keep: Keep = None,
    layer: Layer = None,
    score: ScoreName = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Samples at a time, all with the same image and question.")
    ] = 1,
    cache: Annotated[CacheKind, typer.Option(help="Kind of KV cache.")] = "dynamic",
    compile: Annotated[
        bool, typer.Option("--compile", help="Run decode steps under torch.compile; with --cache static.")
    ] = False,
    graph: Annotated[
        bool,
        typer.Option(
            "--graph",
            help="Measure prefills and decode steps as CUDA graphs on static caches, too. Needs a GPU.",
        ),
    ] = False,
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals",
            help="Measure kvpress and sparsevlm, too, where they are installed and run on this model.",
        ),
    ] = False,
    output_len: Annotated[int, typer.Option(min=2, help="Decode steps to time.")] = 64,
    rounds: Annotated[int, typer.Option(min=2, help="Prefills to time.")] = 20,
    device: Annotated[
        Device | None, typer.Option(help="Default: cuda where there is a GPU, else cpu.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. Default: PyTorch's.")] = None,
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="File for all numbers.")] = None,
) -> None:
    """Measure what pruning saves, and what it costs, on this machine.

    Four variants run in turn on shared weights: sdpa without pruning; attached, which keeps everything; pruned; and
    oracle, the same model handed the surviving tokens with nothing around it. Logits are checked against the oracle
    first. Says the time to the first token, time per token, KV cache, memory, launches and waits for the device.

    Example: gap-triton bench --config smol --keep 0.25

    Your own: gap-triton bench --model llava-hf/llava-1.5-7b-hf --image cat.png --method nuwa --keep 64 --json r.json
    """
    if (model is None) == (config is None):
        raise typer.BadParameter("give either --model or --config, to say what to measure")
    for option, given in (("--image", image), ("--visual-tokens", visual_tokens)):
        wrong = config is not None if option == "--image" else model is not None
        if given is not None and wrong:
            raise typer.BadParameter(
                f"{option} does not go with {'--config' if config else '--model'}: leave it out"
            )
    if compile and cache != "static":
        raise typer.BadParameter(
            "--compile needs --cache static: a cache that grows is compiled anew at each step"
        )
    if graph and device == "cpu":
        raise typer.BadParameter(
            "--graph captures CUDA graphs, which need a GPU: leave out --graph, or --device cpu"
        )
    pruning = pruning_of(method, keep, layer, score)
    if json is not None and not json.absolute().parent.is_dir():
        raise typer.BadParameter(f"--json {str(json)!r}: expected a file in a folder that exists")
    picture = None if image is None else open_image(image)

    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "1"
    )  # else PyTorch's profiler prints lines of its own; read as torch loads
    from .measure import Run, run

    with told_as_option():
        pruning.config_for(None)  # what is wrong for any model is refused before one is loaded
        run(
            Run(
                model, config, picture, prompt, visual_tokens, pruning.config_for, batch, cache == "static", compile,
                output_len, rounds, device, dtype, revision, trust_remote_code, threads, json, graph, rivals,
            ),
            console,
        )  # fmt: skip
