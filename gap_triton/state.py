"""The state of one forward.

Pruning state has three lifetimes: `Attachment` is kept on a model, `KeptTokens` on a cache, and this for one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gap_kernels import PromptRows
from torch import nn

from .attachment import Attachment
from .config import ATTENTION_SCORES, GapConfig, Stage, first_later
from .kv_cache.kept_tokens import KeptTokens
from .memo import Memo
from .selection import Selection
from .strategies.grid_positions import GridPositions
from .vision_tower import TowerRecorder
from .visual_prompt import PromptCounts, VisualPrompt, VisualRows


@dataclass(eq=False)
class Prompt(Memo):
    """The rows of a prefill, as read once before the first layer runs: a prompt, and maybe its answer after it.

    Attributes:
        rows: What the operator found: all rows [B, Q] of the forward.
        answer: [B, Q] bool, the rows of an answer, which rank nothing; None = none.
        counts: How many there are of what, by sample; known on the host.
    """

    rows: PromptRows
    answer: torch.Tensor | None
    counts: PromptCounts

    @property
    def visual(self) -> torch.Tensor:
        """[B, Q] bool, the visual tokens."""
        return self.rows.visual

    @property
    def real(self) -> torch.Tensor:
        """[B, Q] bool, False at padding."""
        return self.rows.real

    @property
    def text_after(self) -> torch.Tensor:
        """[B, Q] bool, the text rows of the prompt after the sample's last visual token."""
        return self.rows.text

    @property
    def visual_counts(self) -> tuple[int, ...]:
        """Number of visual tokens, by sample."""
        return self.counts.visual

    @property
    def real_counts(self) -> tuple[int, ...]:
        """Number of rows that are no padding, by sample."""
        return self.counts.real

    @property
    def text_counts(self) -> tuple[int, ...]:
        """Number of text rows after the last visual token, by sample."""
        return self.counts.text

    @property
    def ends_in_image(self) -> tuple[bool, ...]:
        """Whether the last row of the prompt is a visual token, by sample."""
        return tuple(map(bool, self.counts.ends_in_image))

    @property
    def last_is_real(self) -> tuple[bool, ...]:
        """Whether the last row of the forward is no padding, by sample."""
        return tuple(map(bool, self.counts.last_is_real))

    @property
    def padded(self) -> bool:
        """Whether some row is padding."""
        return any(count < self.visual.shape[1] for count in self.real_counts)

    @property
    def visual_index(self) -> torch.Tensor:
        """[B, V] int64, the visual rows of each sample, ascending, then -1."""
        width = max(self.visual_counts)
        index: torch.Tensor = self.compute_once(
            "visual_index", lambda: self.rows.visual_index[:, :width].contiguous()
        )
        return index

    @property
    def text_rows(self) -> torch.Tensor:
        """[B, R] int64, the rows of `text_after`, ascending, then -1; the last row of the prompt where there are none."""
        width = max(1, *self.text_counts)
        rows: torch.Tensor = self.compute_once(
            "text_rows", lambda: self.rows.text_rows[:, :width].contiguous()
        )
        return rows

    @property
    def query_rows(self) -> torch.Tensor:
        """[B, Q] bool, `real` without the rows of an answer."""
        return self.real if self.answer is None else self.real & ~self.answer

    @property
    def before_answer(self) -> torch.Tensor | None:
        """[B, Q] bool, the visual token that the first token of an answer is predicted from, so that it stays.

        None where no sample has one.
        """
        if self.answer is None or not any(self.ends_in_image):
            return None
        return self.visual & torch.nn.functional.pad(self.answer[:, 1:], (0, 1))


@dataclass(frozen=True)
class VisionSelection:
    """What was chosen after the vision encoder, before the decoder runs.

    Attributes:
        score: [B, V] float32, the score of each visual token, inf for those that always stay.
        ranks: [B, V] float32, of which the ``keep`` largest of each sample survive; None where that is ``score``.
        keep: How many survive, by sample.
    """

    score: torch.Tensor
    ranks: torch.Tensor | None
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Drop:
    """One stage of a prefill, decided on the host before the first layer runs.

    Attributes:
        stage: Where and how.
        keep: How many visual tokens survive, by sample.
        visual_counts: How many visual rows it finds at most, by sample.
        length: L, the number of rows after it.
        dense: Every row after it is a real token, in every sample.
        selection: What was chosen after the vision encoder; None where the stage is in the decoder.
        rankers: [B, Q] bool, the text rows that rank; None where the last row of the prompt does, or no row.
        grid_positions: Positions of visual tokens in their images; None where the stage needs none, or isn't in the decoder.
    """

    stage: Stage
    keep: tuple[int, ...]
    visual_counts: tuple[int, ...]
    length: int
    dense: bool
    selection: VisionSelection | None = None
    rankers: torch.Tensor | None = None
    grid_positions: GridPositions | None = None

    @property
    def first_later(self) -> int:
        """Index of the first layer after it."""
        return first_later(self.stage.layer)


@dataclass(frozen=True)
class Plan:
    """What a stage drops from the rows that it finds: S of them, all Q of the forward in the first stage.

    Attributes:
        visual: [B, S] bool, the visual tokens.
        real: [B, S] bool, False at padding and filler.
        visual_index: [B, V] int64, the visual rows of each sample, ascending, then -1.
        keep: How many of them survive: an int, or [B] int64 where samples differ.
        stays: [B, V] bool, those that survive whatever they score, beyond ``keep`` if need be; None = none.
        rows: [B, R] int64, the query rows whose attention ranks them, -1 = filler.
        filled: No -1 in ``visual_index``; known on the host.
        padded: Some of the S rows may be padding or filler.
    """

    visual: torch.Tensor
    real: torch.Tensor
    visual_index: torch.Tensor
    keep: int | torch.Tensor
    stays: torch.Tensor | None
    rows: torch.Tensor
    filled: bool
    padded: bool

    def to(self, device: torch.device) -> Plan:
        """Return the plan with its tensors on ``device``."""
        return replace(
            self,
            visual=self.visual.to(device),
            real=self.real.to(device),
            visual_index=self.visual_index.to(device),
            keep=self.keep if isinstance(self.keep, int) else self.keep.to(device),
            stays=None if self.stays is None else self.stays.to(device),
            rows=self.rows.to(device),
        )


@dataclass
class HeadArguments:
    """Arguments of a forward that the module with the language head keeps to itself.

    Attributes:
        drafts: Number of last rows that are no prompt: guesses to be verified (``logits_to_keep`` less one), or what
            `generate` without a KV cache has written.
        generated: What `generate` without a KV cache has written, of those.
        logit_rows: ``logits_to_keep`` where it is a tensor: rows [N] or [B, N], or a mask [Q] or [B, Q].
        labels: [B, Q] int64 targets of the loss.
        ignored_label: The label that is no target.
        config: The configuration when the forward began; None without a head.
        reached_owner: The module that receives ``input_ids`` has got them.
    """

    drafts: int = 0
    generated: int = 0
    logit_rows: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    ignored_label: int = -100
    config: GapConfig | None = None
    reached_owner: bool = False


@dataclass
class Deepstack:
    """Features of the vision tower that a model adds to its visual rows after the first decoder layers.

    Attributes:
        rows: [B, Q] bool, the visual rows.
        features: By decoder layer, [rows, C]: what is added to the output of that layer.
    """

    rows: torch.Tensor
    features: dict[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Scoring:
    """What the attention of the scoring layer works on.

    Attributes:
        module: That attention.
        query: [B, Hq, S, D].
        key: [B, Hkv, K, D], or the whole buffer of a static cache.
        mask: None, or [B or 1, Hq or 1, S, K], bool or additive.
        scale: Factor of ``q k^T``, None = ``D ** -0.5``.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None


@dataclass(eq=False)
class Survivors(Memo):
    """The rows that one stage leaves.

    Attributes:
        index: [B, L] int64, rows of the prompt, ascending, -1 = filler.
        order: [B, L] int64, the source row of each of the later layers' hidden states: ``index``, but for
            ``ids="permuted"`` and ``"reordered"``.
        new_ids: [B, L] (or [A, B, L]) int64, their renumbered ids, None for ``ids="kept"``.
        ids: [B, L] (or [A, B, L]) int64, the ids that they have without pruning.
        dense: No -1 in ``index``; known on the host.
        arguments: Arguments of later layers, each with what is left of it for these rows.
    """

    index: torch.Tensor
    order: torch.Tensor
    new_ids: torch.Tensor | None
    ids: torch.Tensor
    dense: bool
    arguments: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def sources(self) -> torch.Tensor:
        """[B, L] int64, ``index`` with row 0 at filler, to gather by."""
        if self.dense:
            return self.index
        sources: torch.Tensor = self.compute_once("sources", lambda: self.index.clamp(min=0))
        return sources


@dataclass(eq=False)
class Prefill:
    """A prompt that is pruned: what is decided before the first layer runs, and how far it has come.

    Attributes:
        prompt: The prompt.
        drops: The stages, first to last; at least one.
        drafts: Number of last rows, of all samples, that are drafts.
        past: Number of original positions in the cache before it.
        position_ids: [B or 1, Q], or [A, B or 1, Q] on several axes: the ids without pruning; None until the layers bring
            them, where the decoder counts by itself.
        keeps: [stages, B] int64, how many tokens each stage keeps; None where all samples keep equally many.
        scoring: What the attention of the scoring layer recorded, until the stage has scored.
        rotary: The rotary embeddings that the scoring layer was handed, until then: the next layer's may be others.
        survivors: The survivors of each stage so far.
        embeds: [B, Q, C], what enters the first layer where tokens are dropped before it; else None.
        selection: What was kept, for users to look at.
    """

    prompt: Prompt
    drops: tuple[Drop, ...]
    drafts: int
    past: int
    position_ids: torch.Tensor | None
    keeps: torch.Tensor | None = None
    scoring: Scoring | None = None
    rotary: Any = None
    survivors: list[Survivors] = field(default_factory=list)
    embeds: torch.Tensor | None = None
    selection: Selection | None = None

    @property
    def done(self) -> int:
        """How many stages have dropped."""
        return len(self.survivors)

    @property
    def next_drop(self) -> Drop | None:
        """The stage that comes next."""
        return self.drops[self.done] if self.done < len(self.drops) else None

    def drop_before(self, index: int) -> Drop | None:
        """Return the stage that drops right before decoder layer ``index``; None where none does."""
        drop = self.next_drop
        return drop if drop is not None and drop.first_later == index else None


@dataclass(eq=False)
class Rows(Memo):
    """The rows that a forward adds, as the decoder gets them.

    Attributes:
        batch, queries: Number of samples and of rows of each, B and Q.
        past: Number of original positions in the cache before them. A tensor in a decode step on a static cache.
        has_4d_mask: The caller gave a mask of four dimensions, which holds more than padding.
        make_real: Makes `real`, which few forwards need.
    """

    batch: int
    queries: int
    past: int | torch.Tensor
    has_4d_mask: bool
    make_real: Callable[[], torch.Tensor | None]

    @property
    def real(self) -> torch.Tensor | None:
        """[B, past + Q] bool, False at padding, read from the caller's mask; None = no padding.

        Where ``past`` is a tensor, as wide as the mask and one column more, which stands for all positions after it.
        """
        real: torch.Tensor | None = self.compute_once("real", self.make_real)
        return real


@dataclass(eq=False)
class DecoderRun(Memo):
    """One run of the decoder in which tokens are dropped, or were before it.

    Attributes:
        config: The configuration of the call.
        attachment: The attachment that it runs under.
        rows: The rows that it adds.
        kept_before: What all layers held before it; None where nothing had been dropped.
        kept: What they hold now.
        prefill: The prompt that it prunes; None where it drops nothing.
        cache: The KV cache, while it is half filled (`kept_tokens.mark_unfinished`).
        position_ids: [B or 1, Q], or [A, B or 1, Q] on several axes: the ids without pruning of rows that follow renumbered
            ones; None elsewhere.
        deepstack: What a model adds to visual rows after later layers; None = nothing.
        survivors_only: The decoder is handed the survivors alone.
        given_mask: The mask that it was given in that case, where that has the shape that attention takes,
            [B or 1, 1, Q, K], or is a dict of those by layer type; else None.
        memo: Tensors that several later layers share: masks, renumbered ids and their rotary embeddings.
    """

    config: GapConfig
    attachment: Attachment
    rows: Rows
    kept_before: KeptTokens | None
    kept: KeptTokens | None
    prefill: Prefill | None = None
    cache: Any = None
    position_ids: torch.Tensor | None = None
    deepstack: Deepstack | None = None
    survivors_only: bool = False
    given_mask: Any = None

    @property
    def survivors(self) -> Survivors | None:
        """The rows that are left by now; None where nothing has been dropped in this run."""
        return self.prefill.survivors[-1] if self.prefill is not None and self.prefill.survivors else None


@dataclass(eq=False)
class DecodeStep:
    """A step of one token whose later layers need nothing but a mask, and no mask either where there is nothing to hide.

    Attributes:
        kept: What all layers hold.
        cache: The KV cache.
        tokens: Number of tokens that the cache stands for after the step; None for a static cache.
        needs_mask: Later layers need one even where the model has none for the others.
        begin_run: Begins the run of the decoder as for any rows, where the model's mask turns out to be none that is known;
            takes how many tokens were there before.
        memo: Tensors that several later layers share, by what they were made from, and the stage where it matters.
    """

    kept: KeptTokens
    cache: Any
    tokens: int | None
    needs_mask: bool
    begin_run: Callable[[int | torch.Tensor], DecoderRun]
    memo: list[tuple[torch.Tensor, int | None, torch.Tensor]] = field(default_factory=list)

    @property
    def places(self) -> int:
        """Number of columns of the first stage's layers, in a cache that grows; with filler, of those that hold the most."""
        assert self.tokens is not None
        return self.tokens - self.kept.covered + max(stage.index.shape[1] for stage in self.kept.stages)

    def compute_once(
        self, source: torch.Tensor, stage: int | None, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return the value of ``make()``, shared by the layers that are handed the same ``source``."""
        # Found by identity, and not by id(), which torch.compile can't carry over a graph break.
        for known, of_stage, value in self.memo:
            if known is source and of_stage == stage:
                return value
        value = make()
        self.memo.append((source, stage, value))
        return value


@dataclass(eq=False)
class OwnerArguments:
    """What the module that receives ``input_ids`` was given.

    Attributes:
        visual: The visual tokens; None where there is no prompt.
        attention_mask: The mask as the caller gave it, before the model makes its own of it.
        by_embedding: Visual tokens were looked for in ``inputs_embeds`` alone, by the embedding of a placeholder.
        prepared: What `gap_triton.prepare` has read of the prompt; None where it was not called.
        kwargs: Its keyword arguments, from which the sizes of images are read; empty once the prompt is planned.
    """

    visual: VisualRows | None = None
    attention_mask: Any = None
    by_embedding: bool = False
    prepared: VisualPrompt | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class ForwardState:
    """State of one forward. Travels through the model's ``**kwargs``, so concurrent forwards never share it.

    Attributes:
        config: The configuration, read once at the start of the call.
        attachment: The attachment that the forward runs under.
        head: Arguments of the module with the language head.
        owner: What the module that receives ``input_ids`` was given.
        enabled: False in training mode, or when the model was switched to another implementation.
        reached_decoder: The decoder has seen this state.
        without_owner: The decoder was called without the module that receives ``input_ids``, with ``visual_mask``.
        recorder: What records the vision encoder; None where nothing of it is needed.
        run: The run of the decoder; None until it begins, and where nothing is or was dropped.
        step: In place of that, a decode step whose later layers need a mask at most.
        passes: A step in which no layer needs anything that is handed no mask.
    """

    config: GapConfig
    attachment: Attachment
    head: HeadArguments
    owner: OwnerArguments
    enabled: bool = True
    reached_decoder: bool = False
    without_owner: bool = False
    recorder: TowerRecorder | None = None
    run: DecoderRun | None = None
    step: DecodeStep | None = None
    passes: bool = False

    def record_attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> None:
        """Record query, key and mask of the scoring layer; do nothing in other layers and other forwards."""
        prefill = None if self.run is None else self.run.prefill
        drop = None if prefill is None else prefill.next_drop
        if prefill is None or drop is None or drop.stage.score not in ATTENTION_SCORES:
            return
        if getattr(module, "layer_idx", None) == drop.stage.layer:
            prefill.scoring = Scoring(module, query, key, mask, scale)
