"""The command line: ``gap-triton demo | run | eval | info``."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import gap_triton
from gap_triton import GapConfig
from gap_triton.config import Ids, Score

app = typer.Typer(
    help="Prune visual tokens of vision-language models and keep every survivor's own position id.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Keep = Annotated[
    str,
    typer.Option(help="Visual tokens to keep: a share such as 0.25, or a count per sample such as 64."),
]


def parse_keep(text: str) -> float | int:
    """Read ``--keep``: ``"64"`` is a count, ``"0.25"`` and ``"1.0"`` are shares."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected a share such as 0.25 or a count such as 64") from None


def make_config(**fields: Any) -> GapConfig:
    """A `GapConfig` whose errors end the command with the sentence alone."""
    try:
        return GapConfig(**fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures and results.json.")] = Path("demo-output"),
    samples: Annotated[int, typer.Option(min=1, help="Held-out scenes to ask about.")] = 512,
) -> None:
    """Prune the embedded model with and without GAP: a table, two pictures and results.json.

    The model was trained for this project to answer "where is the red triangle?" with a box. No pruning is compared with
    keeping 50, 25 and 12.5 % of the visual tokens, each with the survivors' own position ids (GAP), with compacted ids
    and with permuted ids.
    """
    from gap_triton.demo.run import run_demo

    run_demo(output, samples, console)


@app.command()
def run(
    model: Annotated[
        str, typer.Option(help="Folder or hub id of a vision-language model; 'embedded' for our own.")
    ],
    image: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Image file.")],
    prompt: Annotated[
        str, typer.Option(help="What to ask. The image token is put in front where it is missing.")
    ],
    keep: Keep = "0.5",
    layer: Annotated[
        int, typer.Option(help="Decoder layer whose attention scores; dropped before the next.")
    ] = 2,
    score: Annotated[Score, typer.Option(help="What ranks a visual token.")] = "last_token",
    ids: Annotated[Ids, typer.Option(help="Position ids of the survivors; 'kept' is GAP.")] = "kept",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most, in tokens.")] = 64,
    overlay: Annotated[
        Path | None, typer.Option(help="PNG to write: the image as the model sees it, kept tokens lit.")
    ] = None,
) -> None:
    """Ask any supported model about an image, pruned, and show what was kept.

    Example: gap-triton run --model llava-hf/llava-1.5-7b-hf --image cat.png --prompt "Where is the cat?" --keep 0.25
    """
    from gap_triton.single import ask

    config = make_config(keep=parse_keep(keep), layer=layer, score=score, ids=ids)
    if overlay is not None and (overlay.suffix.lower() != ".png" or not overlay.absolute().parent.is_dir()):
        raise typer.BadParameter(f"--overlay {str(overlay)!r}: expected a .png file in a folder that exists")
    try:
        ask(model, image, prompt, config, max_new_tokens, overlay, console)
    except (
        OSError,
        ValueError,
    ) as error:  # no such model, a model that can't be pruned, a layer outside of it
        raise typer.BadParameter(str(error)) from error


@app.command("eval")
def evaluate(
    layers: Annotated[
        str, typer.Option(help="Comma-separated decoder layers; -1 = before the decoder (random score).")
    ] = "-1,0,1,2,3,4",
    keeps: Annotated[str, typer.Option(help="Comma-separated shares or counts.")] = "0.5,0.25,0.125",
    scores: Annotated[str, typer.Option(help="Comma-separated scores.")] = "text",
    samples: Annotated[int, typer.Option(min=1, help="Held-out scenes to ask about.")] = 512,
    output: Annotated[Path, typer.Option(help="Folder for eval.json and eval.md.")] = Path("demo-output"),
) -> None:
    """Measure the embedded model over layers, shares, scores and id rules: the tables of the docs.

    Writes eval.json (rows as in the demo's results.json) and eval.md (the same as a Markdown table).
    """
    from gap_triton.demo.run import IDS, load_embedded_model, markdown_of, run_table, table_of, write_results
    from gap_triton.demo.scenes import held_out
    from gap_triton.environment import default_device

    try:
        chosen_layers = [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--layers {layers!r}: expected comma-separated ints such as -1,0,1"
        ) from None
    configs = []
    for layer, score, keep, ids in product(chosen_layers, scores.split(","), keeps.split(","), IDS):
        # Before the decoder there is no attention to score by.
        used = "random" if layer == -1 else score.strip()
        config = make_config(keep=parse_keep(keep.strip()), layer=layer, score=used, ids=ids)
        if config not in configs:
            configs.append(config)
    device = default_device()
    model, processor = load_embedded_model(device)
    for config in configs:
        try:
            gap_triton.configure(model, config)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    rows = run_table(console, model, processor, held_out(samples), configs)
    output.mkdir(parents=True, exist_ok=True)
    console.print(table_of(rows, f"Grounding on {samples} held-out scenes"))
    write_results(rows, samples, device, output / "eval.json")
    (output / "eval.md").write_text(markdown_of(rows), encoding="utf-8")
    for name in ("eval.json", "eval.md"):
        console.print(f"wrote {output / name}", highlight=False, soft_wrap=True)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for bug reports.")] = False,
) -> None:
    """Show versions, devices and the back ends that apply."""
    from gap_triton.environment import environment

    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table(show_header=False, box=None)
    for package, number in found["versions"].items():
        table.add_row(package, number or "not installed")
    for i, device in enumerate(found["devices"]):
        table.add_row("devices" if i == 0 else "", device)
    for use, backend in found["backends"].items():
        table.add_row(use, backend)
    console.print(table)


if __name__ == "__main__":
    app()
