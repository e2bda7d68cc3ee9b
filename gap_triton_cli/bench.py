"""``gap-triton bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .choices import LAYER, SCORE, Score
from .console import console
from .parse import open_image, parse_keep
from .refuse import told_as_option

Device = Literal["cuda", "cpu"]
Dtype = Literal["float32", "bfloat16", "float16"]
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
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "--preset", help="Published method by name, such as fastv; --keep is its budget."
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep", "--budget", help="Visual tokens to keep: a share such as 0.25, or a count such as 64."
        ),
    ] = "0.25",
    layer: Annotated[
        int | None,
        typer.Option(
            help=f"Decoder layer whose attention scores; -1: after the vision encoder. Default: {LAYER}"
        ),
    ] = None,
    score: Annotated[Score | None, typer.Option(help=f"What ranks a visual token. Default: {SCORE}")] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Samples at a time, all with the same image and question.")
    ] = 1,
    cache: Annotated[CacheKind, typer.Option(help="Kind of KV cache.")] = "dynamic",
    compile: Annotated[
        bool, typer.Option("--compile", help="Run decode steps under torch.compile; with --cache static.")
    ] = False,
    output_len: Annotated[int, typer.Option(min=2, help="Decode steps to time.")] = 64,
    rounds: Annotated[int, typer.Option(min=2, help="Prefills to time.")] = 20,
    device: Annotated[
        Device | None, typer.Option(help="Default: cuda where there is a GPU, else cpu.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights. Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
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
    budget = parse_keep(keep)
    axes = {name: value for name, value in (("layer", layer), ("score", score)) if value is not None}
    if method is not None and axes:
        raise typer.BadParameter(f"--{next(iter(axes))} is part of a method: leave it out, or --method")
    if json is not None and not json.absolute().parent.is_dir():
        raise typer.BadParameter(f"--json {str(json)!r}: expected a file in a folder that exists")
    picture = None if image is None else open_image(image)

    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "1"
    )  # else PyTorch's profiler prints lines of its own; read as torch loads
    from gap_triton import GapConfig

    from .measure import Run, run

    def config_for(loaded: Any) -> GapConfig:
        if method is None:
            return GapConfig(keep=budget, **axes)  # type: ignore[arg-type]
        return GapConfig.preset(method, budget=budget, model=loaded)

    with told_as_option():
        config_for(None)  # what is wrong for any model is refused before one is loaded
        run(
            Run(
                model, config, picture, prompt, visual_tokens, config_for, batch, cache == "static", compile, output_len,
                rounds, device, dtype, threads, json,
            ),
            console,
        )  # fmt: skip
