"""Options that several commands have, with one name and one meaning in all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .choices import KEEP, LAYER, SCORE, Score
from .parse import parse_keep

if TYPE_CHECKING:
    from gap_triton import GapConfig

Keep = Annotated[
    str | None,
    typer.Option(
        "--keep",
        "--budget",
        help="Visual tokens to keep: a share such as 0.25, or a count per sample such as 64; with --method its budget. "
        f"Default: {KEEP}, or that of the method",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        "--preset",
        help="Published method by name, such as fastv or nuwa: gap-triton methods lists them.",
    ),
]
Layer = Annotated[
    int | None,
    typer.Option(
        help="Decoder layer whose attention scores; dropped before the next. -1: after the vision encoder. "
        f"Default: {LAYER}"
    ),
]
ScoreName = Annotated[Score | None, typer.Option(help=f"What ranks a visual token. Default: {SCORE}")]
Revision = Annotated[
    str | None, typer.Option(help="With a hub id: branch, tag or commit of the model. Default: main.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that comes with the model. Read it first."),
]


@dataclass(frozen=True)
class Pruning:
    """What the options say of pruning; what is wrong with them for any model is refused at once.

    Attributes:
        method: Published method, None = by the axes.
        keep: Share or count; None = the default, of the method where there is one.
        axes: Axes of `GapConfig` that are given; a method sets these itself.
        others: Fields of `GapConfig` that go with a method too.
    """

    method: str | None
    keep: float | int | None
    axes: dict[str, Any]
    others: dict[str, Any]

    def config_for(self, model: Any) -> GapConfig:
        """The configuration for a model that has been loaded, or for any: None.

        Raises:
            ValueError: A value is out of range, or does not go with this model.
        """
        from gap_triton import GapConfig

        if self.method is None:
            keep = KEEP if self.keep is None else self.keep
            return GapConfig(keep=keep, **self.axes, **self.others)
        budget = {} if self.keep is None else {"budget": self.keep}
        return replace(GapConfig.preset(self.method, model=model, **budget), **self.others)


def pruning_of(
    method: str | None, keep: str | None, layer: int | None, score: Score | None, **others: int | str
) -> Pruning:
    """Read the options that say how to prune.

    Raises:
        BadParameter: An axis is given beside a method, or ``keep`` is no number.
    """
    given: dict[str, Any] = {
        name: value for name, value in (("layer", layer), ("score", score)) if value is not None
    }
    if method is not None and given:
        raise typer.BadParameter(f"--{next(iter(given))} is part of a method: leave it out, or --method")
    return Pruning(method, None if keep is None else parse_keep(keep), given, others)
