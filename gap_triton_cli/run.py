"""``gap-triton run``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .choices import LAYER, SCORE, Ids, Score
from .console import console
from .parse import open_image, parse_keep
from .refuse import told_as_option

if TYPE_CHECKING:
    from gap_triton import GapConfig

Keep = Annotated[
    str,
    typer.Option(help="Visual tokens to keep: a share such as 0.25, or a count per sample such as 64."),
]


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
    options = {"layer": layer, "score": score}
    given = {name: value for name, value in options.items() if value is not None}
    if method is not None and given:
        raise typer.BadParameter(f"--{next(iter(given))} is part of a method: leave it out, or --method")
    if not prompt.strip():
        raise typer.BadParameter(f"--prompt {prompt!r}: expected a question or a request, in words")
    if overlay is not None:
        check_overlay_file(overlay, len(image))
    images = [open_image(path) for path in image]

    from gap_triton import GapConfig

    from .ask import ask

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
