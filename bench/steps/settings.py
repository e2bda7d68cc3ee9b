"""How much the steps do: the named shapes on a GPU, as little as there is on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from bench import cuda, operators
from bench.operators import Call
from bench.shapes import DECODERS, TINY_DECODER, TINY_TOWER, TOWERS, Case, find

RELAUNCHES, RELAUNCHES_ON_A_CPU = 10_000, 25


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        device: Where.
        decoders: Prompts that results are compared on; the first also in float32.
        towers: Vision towers, likewise.
        small: Prompt that host times, streams and graphs are tried on.
        small_tower: Vision tower, likewise.
        waiting: Prompts of whose programs some wait for others, by tickets; the first are small enough for all programs
            to run at once.
        at_once: How many of them are.
        compared: Prompts on which one launch is timed against several.
        relaunches: How often ``prune_tokens`` is launched again.
        alternating: The prompts it alternates between.
        repeats: Rounds of every operator per thread, and replays per graph.
        threads: Threads, with a stream each.
        budget_s: Seconds that one timing may take.
        visual_tokens: Of the prompts of whole models.
        answer: Tokens that whole models write.
    """

    device: torch.device
    decoders: tuple[Case, ...] = (*(Case(shape, 1) for shape in DECODERS), Case(DECODERS[0], 8))
    towers: tuple[Case, ...] = tuple(Case(shape, 1) for shape in TOWERS)
    small: Case = field(default=Case(find("llava-1.5"), 1))
    small_tower: Case = field(default=Case(find("clip-336"), 1))
    waiting: tuple[Case, ...] = (
        Case(TINY_DECODER, 1),
        Case(TINY_DECODER, 2),
        Case(find("llava-1.5"), 1),
        Case(find("llava-next"), 1),
        Case(find("qwen2.5-vl-4k"), 1),
        Case(find("llava-1.5"), 8),
    )
    at_once: int = 2
    compared: tuple[Case, ...] = (
        Case(find("llava-1.5"), 1),
        Case(find("qwen2.5-vl-1k"), 1),
        Case(find("llava-next"), 1),
        Case(find("qwen2.5-vl-4k"), 1),
        Case(find("llava-1.5"), 8),
        Case(find("llava-next"), 8),
    )
    relaunches: int = RELAUNCHES
    alternating: tuple[Case, ...] = (
        Case(find("llava-1.5"), 1),
        Case(find("llava-next"), 1),
        Case(find("llava-1.5"), 4),
        Case(TINY_DECODER, 2),
    )
    repeats: int = 50
    threads: int = 4
    budget_s: float = 0.1
    visual_tokens: tuple[int, ...] = (576, 2880, 4096)
    answer: int = 16

    @property
    def dtype(self) -> torch.dtype:
        """What models run in: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if cuda.is_cuda(self.device) else torch.float32

    def every_call(self) -> Iterator[tuple[str, Call, Case]]:
        """Each operator with the small case that it is tried on."""
        for name, call in operators.DECODER_CALLS.items():
            yield name, call, self.small
        for name, call in operators.TOWER_CALLS.items():
            yield name, call, self.small_tower


def tiny(device: torch.device) -> Settings:
    """As little as every step can be run on."""
    decoder, tower = Case(TINY_DECODER, 2), Case(TINY_TOWER, 2)
    return Settings(
        device,
        decoders=(decoder,),
        towers=(tower,),
        small=decoder,
        small_tower=tower,
        waiting=(decoder,),
        at_once=1,
        compared=(decoder,),
        relaunches=RELAUNCHES_ON_A_CPU,
        alternating=(decoder, Case(TINY_DECODER, 1)),
        repeats=2,
        threads=2,
        budget_s=0.005,
        visual_tokens=(40,),
        answer=4,
    )


def settings_for(device: torch.device) -> Settings:
    """The named shapes on a GPU, tiny ones on a CPU."""
    return Settings(device) if cuda.is_cuda(device) else tiny(device)
