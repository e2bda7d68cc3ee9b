"""Questions about images and videos to one model, for ``gap-triton run``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import gap_triton
from gap_triton import GapConfig

from .generate import Answer, Sampling, generate
from .loading import Source, torch_device
from .overlay import check_overlay, save_kept_tokens
from .prompts import inputs_of, with_images
from .questions import Question
from .report import as_fields, in_words, table_of, what_was_kept

WARM_UP = Sampling(max_new_tokens=2)


@dataclass(frozen=True)
class Show:
    """What is shown of an answer.

    Attributes:
        compare: Whether the model answers without pruning too, first.
        as_json: Whether an object a line is printed, and nothing else.
        overlay: Where to write a picture of the kept tokens, None = nowhere.
    """

    compare: bool = False
    as_json: bool = False
    overlay: Path | None = None


def ask(
    source: Source,
    questions: Sequence[Question],
    config_for: Callable[[Any], GapConfig],
    sampling: Sampling,
    show: Show,
    console: Console,
) -> None:
    """Load a model, answer each question with pruning, and print what was kept and what it took.

    Args:
        source: Which model, and how it is loaded.
        questions: What to ask, each on its own. Image tokens are put in front where they are missing, through the chat
            template where the processor has one.
        config_for: What to prune in a model that has been loaded.
        sampling: How tokens are chosen.
        show: What to print and write.
        console: Where to print.

    Raises:
        ValueError: There is no such model or device, it can't be loaded or pruned, a prompt has image tokens for another
            number of images, or ``show.overlay`` is given and its tokens can't be drawn.
        ImportError: Its processor needs a package that is not installed.
    """
    torch_device(source.device)
    config, processor = source.load_processor()
    if show.overlay is not None:
        check_overlay(config)
    image_text = None if source.embedded is None else source.embedded.image_text
    texts = [
        with_images(processor, each.prompt, len(each.images), image_text, len(each.videos))
        for each in questions
    ]
    model = source.load_model("gap_triton")
    pruning = config_for(model)
    gap_triton.configure(model, pruning)
    asker = Asker(model, processor, pruning, sampling, show, console)
    for number, (question, text) in enumerate(zip(questions, texts, strict=True)):
        inputs = inputs_of(processor, text, question.open_images(), question.open_videos(), source.embedded)
        inputs = inputs.to(model.device, model.dtype)
        if show.compare and not number:
            asker.warm_up(inputs)
        if len(questions) > 1 and not show.as_json:
            named = ", ".join(path.name for path in (*question.images, *question.videos))
            console.print(f"{named}: {question.prompt}", style="dim", markup=False, highlight=False)
        asker.ask(question, inputs)


@dataclass(frozen=True)
class Asker:
    """A model that is pruned, and how it is asked and its answers are shown."""

    model: Any
    processor: Any
    pruning: GapConfig
    sampling: Sampling
    show: Show
    console: Console

    def ask(self, question: Question, inputs: Any) -> None:
        """Answer one question, and show what was asked for."""
        unpruned = self.unpruned(inputs, self.sampling, "no pruning") if self.show.compare else None
        answer = self.answer(inputs, self.sampling, "pruned" if self.show.compare else "")
        kept = what_was_kept(self.model, inputs, self.pruning)
        if self.show.as_json:
            print(json.dumps(as_fields(question, kept, answer, unpruned)), flush=True)
        else:
            self.console.print(f"{kept}", style="dim", highlight=False)
            self.console.print(table_of(unpruned, answer) if unpruned else in_words(answer), style="dim")
        if self.show.overlay is not None:
            self.draw(self.show.overlay, inputs, answer)

    def warm_up(self, inputs: Any) -> None:
        """Answer with and without pruning, so that what a first call compiles and allocates is not timed."""
        self.unpruned(inputs, WARM_UP, None)
        self.answer(inputs, WARM_UP, None)

    def answer(self, inputs: Any, sampling: Sampling, name: str | None) -> Answer:
        """Answer, and print the words behind ``name``; None = print nothing."""
        streamed = name is not None and not self.show.as_json
        if streamed and name:
            print(f"{name}: ", end="", flush=True)
        return generate(self.model, self.processor, inputs, sampling, streamed)

    def unpruned(self, inputs: Any, sampling: Sampling, name: str | None) -> Answer:
        """The same by the model as it is without `gap_triton`."""
        self.model.set_attn_implementation("sdpa")
        try:
            return self.answer(inputs, sampling, name)
        finally:
            self.model.set_attn_implementation("gap_triton")
            gap_triton.configure(self.model, self.pruning)  # switching back brings the default

    def draw(self, overlay: Path, inputs: Any, answer: Answer) -> None:
        """Write the picture of what the last answer was made from.

        Raises:
            ValueError: Nothing was dropped.
        """
        selection = gap_triton.last_selection(self.model)
        if selection is None:
            raise ValueError(
                f"overlay: nothing was dropped at keep={self.pruning.keep}; leave the overlay out"
            )
        save_kept_tokens(self.model, self.processor, inputs, selection, answer.text, overlay)
        if not self.show.as_json:
            self.console.print(f"wrote {overlay}", highlight=False, soft_wrap=True)
