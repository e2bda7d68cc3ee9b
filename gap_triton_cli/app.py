"""The command line: ``gap-triton demo | run | eval | info``."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .choices import ARCHITECTURES, LAYER, SCORE, Ids, Score
from .parse import open_image, parse_keep, parse_layers, split, split_names
from .refuse import Commands, told_as_option

if TYPE_CHECKING:
    from gap_triton import GapConfig

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

Keep = Annotated[
    str,
    typer.Option(help="Visual tokens to keep: a share such as 0.25, or a count per sample such as 64."),
]


# What `gap-triton eval` sweeps by default.
LAYERS, SCORES, IDS = "-1,0,1,2,3,4", "text", "kept,compacted,permuted"


def show_version(asked: bool) -> None:
    """Print the version and end, for ``--version``."""
    if asked:
        try:
            found = version("gap-triton")
        except PackageNotFoundError:  # a checkout on the path
            from gap_triton import __version__ as found
        typer.echo(f"gap-triton {found}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Prune visual tokens of vision-language models and keep every survivor's own position id."""


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for pictures and results.json; made if missing.")
    ] = Path("demo-output"),
    samples: Annotated[int, typer.Option(min=1, help="Held-out scenes to ask about.")] = 512,
) -> None:
    """Prune the embedded model with and without GAP: a table, two pictures and results.json.

    The model was trained for this project to answer "where is the red triangle?" with a box. No pruning is compared with
    keeping 50, 25 and 12.5 % of the visual tokens, each with the survivors' own position ids (GAP), with compacted ids
    and with permuted ids.
    """
    from gap_triton.demo.run import run_demo

    with told_as_option("--output"):
        output.mkdir(parents=True, exist_ok=True)
    run_demo(output, samples, console)


@app.command()
def run(
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of a vision-language model; 'embedded', our own LLaVA, or 'embedded-mrope', our own "
            "Qwen2.5-VL."
        ),
    ],
    image: Annotated[
        list[Path], typer.Option(exists=True, dir_okay=False, help="Image file; repeat it for more images.")
    ],
    prompt: Annotated[
        str, typer.Option(help="What to ask. The image tokens are put in front where they are missing.")
    ],
    keep: Keep = "0.5",
    method: Annotated[
        str | None,
        typer.Option(help="Published method by name, such as fastv or nuwa; --keep is its budget."),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Decoder layer whose attention scores; dropped before the next. -1: after the vision encoder. "
            f"Default: {LAYER}"
        ),
    ] = None,
    score: Annotated[Score | None, typer.Option(help=f"What ranks a visual token. Default: {SCORE}")] = None,
    ids: Annotated[Ids, typer.Option(help="Position ids of the survivors; 'kept' is GAP.")] = "kept",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most, in tokens.")] = 64,
    overlay: Annotated[
        Path | None, typer.Option(help="PNG to write: the image as the model sees it, kept tokens lit.")
    ] = None,
) -> None:
    """Ask any supported model about an image, pruned, and show what was kept.

    Example: gap-triton run --model llava-hf/llava-1.5-7b-hf --image cat.png --prompt "Where is the cat?" --keep 0.25

    With a published method: gap-triton run ... --method nuwa --keep 64
    """
    budget = parse_keep(keep)
    own = {"layer": layer, "score": score}
    given = {name: value for name, value in own.items() if value is not None}
    if method is not None and given:
        raise typer.BadParameter(f"--{next(iter(given))} is part of a method: leave it out, or --method")
    if not prompt.strip():
        raise typer.BadParameter(f"--prompt {prompt!r}: expected a question or a request, in words")
    if overlay is not None:
        check_overlay_file(overlay, len(image))
    images = [open_image(path) for path in image]

    from gap_triton import GapConfig
    from gap_triton_cli.ask import ask

    def config_for(loaded: Any) -> GapConfig:
        if method is None:
            return GapConfig(keep=budget, ids=ids, **given)  # type: ignore[arg-type]
        return replace(GapConfig.preset(method, budget=budget, model=loaded), ids=ids)

    with told_as_option():
        config_for(None)  # what is wrong for any model is refused before one is loaded
        ask(model, images, prompt, config_for, max_new_tokens, overlay, console)


def check_overlay_file(overlay: Path, images: int) -> None:
    """Refuse what can't be drawn, or not there, before anything is loaded."""
    if overlay.suffix.lower() != ".png" or overlay.is_dir() or not overlay.absolute().parent.is_dir():
        raise typer.BadParameter(f"--overlay {str(overlay)!r}: expected a .png file in a folder that exists")
    if images > 1:
        raise typer.BadParameter(f"--overlay draws one image, and {images} are given; leave it out")
    import matplotlib  # noqa: F401


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Embedded model: llava, qwen2_5_vl, or all.")] = "llava",
    methods: Annotated[
        str | None,
        typer.Option(help="Measure presets: all, or comma-separated names such as fastv,nuwa."),
    ] = None,
    coverage: Annotated[
        bool,
        typer.Option("--coverage", help="Measure coverage (top-k, region, stride, random) x position ids."),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Sweep: comma-separated decoder layers, as in --layers=-1,0,1; -1 = after the vision encoder. Default: "
            f"{LAYERS}",
        ),
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            help="Sweep: comma-separated scores. At -1 those of the decoder become random; those of the vision encoder "
            f"apply at -1 only. Default: {SCORES}",
        ),
    ] = None,
    ids: Annotated[
        str | None, typer.Option(help=f"Sweep: comma-separated position ids. Default: {IDS}")
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", "--keeps", help="Comma-separated shares or counts of visual tokens.")
    ] = "0.5,0.25,0.125",
    samples: Annotated[int, typer.Option(min=1, help="Held-out scenes to ask about.")] = 512,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the files; made if missing.")
    ] = Path("demo-output"),
) -> None:
    """Measure the embedded models by real generation: the tables of the docs.

    --methods writes methods.json, .md and .png: each preset at each budget, ids kept and compacted. --coverage writes
    coverage.json, .md and .png. Without either, layers x scores x budgets x ids are swept: eval.json and eval.md.

    Example: gap-triton eval --methods all --coverage --model all
    """
    from gap_triton.demo.evaluation import Evaluation, sweep_configs
    from gap_triton.presets import PRESETS

    shares = [parse_keep(item, "--budgets") for item in split(budgets)]
    if any(isinstance(share, float) and share == 1.0 for share in shares):
        raise typer.BadParameter("--budgets 1.0 drops nothing; no pruning is always the first row")
    swept = {"--layers": layers, "--scores": scores, "--ids": ids}
    given = [option for option, value in swept.items() if value is not None]
    if given and (methods is not None or coverage):
        raise typer.BadParameter(
            f"{given[0]} belongs to the sweep; leave it out, or --methods and --coverage"
        )
    names = split_names("--methods", "all" if methods is None else methods, PRESETS)
    with told_as_option("--model"):
        evaluation = Evaluation(console, output, samples, split_names("--model", model, ARCHITECTURES))
    if methods is not None:
        with told_as_option("--methods"):
            evaluation.add_methods(names, shares)
    if coverage:
        with told_as_option("--coverage"):
            evaluation.add_coverage(shares)
    if methods is None and not coverage:
        with told_as_option("--layers, --scores, --ids"):
            evaluation.add_sweep(
                sweep_configs(
                    parse_layers(LAYERS if layers is None else layers),
                    split(SCORES if scores is None else scores),
                    shares,
                    split(IDS if ids is None else ids),
                )
            )
    with told_as_option("--output"):
        output.mkdir(parents=True, exist_ok=True)
    evaluation.run()


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
