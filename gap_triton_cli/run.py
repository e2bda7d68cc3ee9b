"""``gap-triton run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .choices import DtypeOrSaved, Ids
from .console import console
from .options import Keep, Layer, Method, Revision, ScoreName, TrustRemoteCode, pruning_of
from .questions import Question, read_questions
from .refuse import told_as_option


def run(
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of a vision-language model; 'embedded', our own LLaVA, or 'embedded-mrope', our own "
            "Qwen2.5-VL."
        ),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Image file; repeat it for more images."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            help="Video file (needs torchcodec), or a folder of frames; repeat it for more. For models that read videos.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to ask. The image tokens are put in front where they are missing."),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Many questions: a JSON object a line, with image or video (a file or a list) and prompt. Other fields go "
            "to the answer.",
        ),
    ] = None,
    keep: Keep = None,
    method: Method = None,
    layer: Layer = None,
    score: ScoreName = None,
    ids: Annotated[Ids, typer.Option(help="Position ids of the survivors; 'kept' is GAP.")] = "kept",
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Answer without pruning too, and show both answers and what they took."
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object a line for each answer, and nothing else.")
    ] = False,
    overlay: Annotated[
        Path | None, typer.Option(help="PNG to write: the image as the model sees it, kept tokens lit.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most, in tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the draws of tokens; 0: the likeliest each time.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw from this share of the probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws, those of --score random too.")] = 0,
    dtype: Annotated[
        DtypeOrSaved | None,
        typer.Option(
            help="Of the weights; auto: as saved. Default: bfloat16 on a GPU, float32 on a CPU.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, or auto: spread over all GPUs (needs accelerate). Default: the first GPU, else the CPU."
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ask any supported model about images or videos, pruned, and show what was kept and what it took.

    Example: gap-triton run --model llava-hf/llava-1.5-7b-hf --image cat.png --prompt "Where is the cat?" --keep 0.25

    With a published method, against no pruning: gap-triton run ... --method nuwa --keep 64 --compare

    Many questions: gap-triton run --model ... --input questions.jsonl --json > answers.jsonl
    """
    pruning = pruning_of(method, keep, layer, score, ids=ids, seed=seed)
    if temperature == 0:
        for option, value in (("--top-p", top_p), ("--top-k", top_k)):
            if value is not None:
                raise typer.BadParameter(f"{option} is for draws: give --temperature above 0 with it")
    questions = questions_of(image or [], video or [], prompt, input)
    if overlay is not None:
        check_overlay_file(overlay, questions)
    for question in questions:
        question.check()

    from .ask import Show, ask
    from .generate import Sampling
    from .loading import Source

    with told_as_option():
        pruning.config_for(None)  # what is wrong for any model is refused before one is loaded
        ask(
            Source(model, dtype, device, revision, trust_remote_code),
            questions,
            pruning.config_for,
            Sampling(max_new_tokens, temperature, top_p, top_k, seed),
            Show(compare, json, overlay),
            console,
        )


def questions_of(
    images: list[Path], videos: list[Path], prompt: str | None, file: Path | None
) -> list[Question]:
    """The questions that the options name.

    Raises:
        BadParameter: They name none, or in two ways.
    """
    if file is not None:
        if images or videos:
            option = "--image" if images else "--video"
            raise typer.BadParameter(f"{option} and --input both say what to look at: leave one of them out")
        return read_questions(file, prompt)
    if prompt is None:
        raise typer.BadParameter("give --prompt, to say what to ask, or --input for many questions")
    return [Question(prompt, tuple(images), tuple(videos))]


def check_overlay_file(overlay: Path, questions: list[Question]) -> None:
    """Refuse what can't be drawn, or not there, before anything is loaded."""
    if overlay.suffix.lower() != ".png" or overlay.is_dir() or not overlay.absolute().parent.is_dir():
        raise typer.BadParameter(f"--overlay {str(overlay)!r}: expected a .png file in a folder that exists")
    images = sum(len(each.images) for each in questions)
    if images != 1 or any(each.videos for each in questions):
        raise typer.BadParameter(
            f"--overlay draws one image, and {images} are given"
            + (" with videos" if any(each.videos for each in questions) else "")
            + "; leave it out"
        )
    import matplotlib  # noqa: F401
