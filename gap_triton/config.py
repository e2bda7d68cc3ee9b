"""What to prune, where and by which rule: frozen, validated dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from gap_kernels.prune.coverage import as_ratio
from gap_kernels.validation import is_finite

from .plain import is_int, plain, shown
from .strategies import Coverage
from .strategies.by_features import BY_FEATURES, WEIGHTED
from .strategies.two_layers import BY_TWO_LAYERS

Score = Literal[
    "last_token",
    "text",
    "raters",
    "raters_corrected",
    "unrotated",
    "key_norm",
    "cls",
    "received",
    "text_similarity",
    "random",
    "spatial",
]
Merge = Literal["none", "aggregation", "contextual", "nearest", "average", "cluster"]
Ids = Literal["kept", "compacted", "permuted", "reordered", "stretched"]
ShareOf = Literal["prompt", "left"]
BudgetBy = Literal["tokens", "tiles"]
Outliers = Literal["outliers"]

BEFORE_THE_DECODER = -1

# What can rank a token depends on where it is ranked.
DECODER_SCORES = (
    *("last_token", "text", "raters", "raters_corrected", "unrotated", "key_norm", "random", "spatial"),
)
VISION_SCORES = ("cls", "received", "key_norm", "text_similarity", "random", "spatial")
# Coverages that depend on the position of a token in its image.
GRID_COVERAGES = ("region", "stride")
# Coverages that exist after the vision encoder only.
VISION_COVERAGES = ("distinct", *BY_TWO_LAYERS)
# Scores from a decoder layer's query and key; the others need no attention.
ATTENTION_SCORES = ("last_token", "text", "raters", "raters_corrected", "unrotated", "key_norm")
# Scores that depend on the text of the prompt; the others are the same whatever text follows the image.
TEXT_SCORES = ("last_token", "text", "raters", "raters_corrected", "unrotated", "text_similarity")


STAGE_FIELDS = (
    *("keep", "layer", "score", "coverage", "merge"),
    *("exponent", "per_region", "spread", "share_of", "budget_by"),
)


@dataclass(frozen=True)
class Stage:
    """One place at which visual tokens are dropped.

    Attributes:
        keep: A float in (0, 1] is the share of each sample's visual tokens that survives, rounded up. An int >= 1 is their
            number per sample; a sample with fewer keeps all. One more survives only where a prompt ends in a visual token
            that was not chosen, because its logits are read. After the vision encoder the images of a sample (tiles and
            frames included) share the number by their size; where it is less than the number of images, some get none.
            Newline tokens (LLaVA-NeXT and similar models) are in no grid and count among the survivors. Where a score or a
            coverage needs positions in the image, all of them stay while they take at most half of the number; otherwise
            as many as make half of it, evenly spread. ``"outliers"``, after the vision encoder only, keeps the newlines and
            the tokens of each image whose score is above the third quartile by more than 1.5 interquartile ranges
            (PruMerge, arXiv 2403.15388, section 3.2).
        layer: 0-based decoder layer. Tokens are scored in this layer's attention and dropped before the next layer.
            ``-1`` is after the vision encoder: they are dropped before the first decoder layer.
        score: What ranks a visual token. In the decoder: ``"last_token"``, the attention of the last prompt token, mean
            over heads (FastV, arXiv 2403.06764, section 4.1); ``"text"``, the same averaged over the text rows after the
            sample's last visual token; ``"raters"``, averaged over those of them whose own relevance to the image is at
            least the mean (SparseVLM, arXiv 2410.04417, section 3.2); ``"raters_corrected"``, the same over what RoPE makes
            of equal queries and keys at that distance, of the 14 in 32 heads where it is most (SparseVLM+, sections 4.2 and
            4.3); ``"unrotated"``, attention of the last prompt token among the visual tokens alone, with queries and keys as
            they are before RoPE (FEATHER, arXiv 2412.13180, section 4). After the vision encoder: ``"cls"``, attention of
            its CLS token; ``"received"``, the attention that a token receives there; ``"text_similarity"``, the cosine to
            the mean embedding of the text (TRIM, arXiv 2409.10994). In both: ``"key_norm"``, the norm of the
            token's keys; ``"random"``, drawn from ``seed``; ``"spatial"``, evenly spread over the image.
        coverage: How the scores choose. ``"topk"``, the best; ``"region"``, the best of those that are among the best of
            their 2 x 2 tokens (Nüwa, arXiv 2602.02951, section 3.1); ``"stride"``, a part evenly spread over the image, the
            rest by score (FEATHER). Others compare tokens by their features, which are in a decoder layer its hidden states,
            and after the vision encoder what the decoder gets: ``"max_min"``, as far from each other as can be, whatever
            their scores (DivPrune, arXiv 2503.02175); ``"determinant"``, unlike each other and well scored (CDPruner, arXiv
            2506.10967); ``"coverage_gain"``, those that stand for most of the others, times the score (SCOPE, arXiv
            2510.24214); ``"least_similar"``, least like the 4 best (DART, arXiv 2502.11494); ``"distinct"``, after the
            vision encoder only, a half by score, and of the others those that are like none (VisPruner, arXiv 2412.01818).
            Where the vision encoder ranks, ``"coverage_gain"`` and ``"distinct"`` compare what enters the projector. Two
            more rank in an earlier layer of the vision encoder too: ``"anchors"``, a few tokens by that with their
            neighbours (HiPrune, arXiv 2508.00553), and ``"windows"``, a half by that, from 4 x 4 parts of the image (VScan,
            arXiv 2505.22654); the rest by score.
        exponent: A finite number >= 0, the power to which ``"determinant"`` and ``"coverage_gain"`` take the score, as
            SCOPE's alpha: by 0 features decide alone, and the larger it is, the more the score does.
        merge: What becomes of the rest, after the vision encoder only: ``"none"``, nothing; ``"aggregation"`` (Nüwa),
            ``"contextual"`` (VisionZip, arXiv 2412.04467), ``"nearest"`` (PruMerge), ``"average"`` (TRIM) or
            ``"cluster"`` (VScan) add it to survivors. `gap_triton.strategies` has the formulas.
        per_region: For ``coverage="region"``: how many of each 2 x 2 tokens are candidates, an int >= 1; the best of the
            others fill up what these don't suffice for. None = as many as suffice.
        spread: For ``coverage="stride"``: the part of ``keep`` that is evenly spread, a float in [0, 1]. None = 0.3.
        share_of: What a ``keep`` that is a share is a share of. ``"prompt"``: the visual tokens of the prompt, rounded up.
            ``"left"``, for a stage of ``then``: those that the stages before left, rounded down, but at least one.
        budget_by: After the vision encoder, how the images of a sample share ``keep``. ``"tokens"``: by their size, newline
            tokens included, as said above. ``"tiles"``, of models that cut an image into tiles (LLaVA-NeXT): every tile
            gets equally many, rounded down, the overview is one of them, and all newline tokens stay besides.

    Raises:
        ValueError: A field is out of range or of the wrong type, or does not go with another; the message names the
            field, the value and what is allowed.
    """

    keep: float | int | Outliers = 0.5
    layer: int = 2
    score: Score = "text"
    coverage: Coverage = "topk"
    merge: Merge = "none"
    exponent: float = field(default=1.0, kw_only=True)
    per_region: int | None = field(default=None, kw_only=True)
    spread: float | None = field(default=None, kw_only=True)
    share_of: ShareOf = field(default="prompt", kw_only=True)
    budget_by: BudgetBy = field(default="tokens", kw_only=True)

    def __post_init__(self) -> None:
        for name in STAGE_FIELDS:
            object.__setattr__(self, name, plain(getattr(self, name)))
        self._check_keep()
        if not is_int(self.layer) or self.layer < BEFORE_THE_DECODER:
            raise self._error(
                "layer", "expected a decoder layer, an int >= 0, or -1 for after the vision encoder"
            )
        self._check_option("score", get_args(Score))
        self._check_option("coverage", get_args(Coverage))
        self._check_option("merge", get_args(Merge))
        in_vision = self.layer == BEFORE_THE_DECODER
        allowed, location = (
            (VISION_SCORES, "after the vision encoder (layer=-1)")
            if in_vision
            else (DECODER_SCORES, "in a decoder layer")
        )
        if self.score not in allowed:
            raise self._error(
                "score", f"{location} it is one of {_joined(allowed)}", f" with layer={shown(self.layer)}"
            )
        if not in_vision and self.coverage in VISION_COVERAGES:
            raise self._error(
                "coverage",
                "it exists after the vision encoder only; use layer=-1, or one that exists in the decoder: "
                + _joined(tuple(each for each in get_args(Coverage) if each not in VISION_COVERAGES)),
            )
        if self.coverage in BY_TWO_LAYERS and self.score not in ("cls", "received"):
            raise self._error(
                "coverage",
                "it ranks in two layers of the vision encoder; use score='cls' or 'received'",
                f" with score={shown(self.score)}",
            )
        if not in_vision and self.merge != "none":
            raise self._error("merge", "tokens are merged after the vision encoder only; use layer=-1")
        if not is_finite(self.exponent) or self.exponent < 0:
            raise self._error("exponent", "expected a finite number >= 0")
        object.__setattr__(self, "exponent", float(self.exponent))
        if self.exponent != 1.0 and self.coverage not in WEIGHTED:
            raise self._error(
                "exponent",
                f"only coverage={' or '.join(map(repr, WEIGHTED))} takes the score to a power",
                f" with coverage={shown(self.coverage)}",
            )
        if self.keep == "outliers" and (not in_vision or self.score in ("random", "spatial")):
            raise self._error(
                "keep",
                "outliers are those of a score measured after the vision encoder; use layer=-1 and such a score",
            )

        self._check_options_of_coverage()
        self._check_option("share_of", get_args(ShareOf))
        self._check_option("budget_by", get_args(BudgetBy))
        if self.share_of == "left" and not isinstance(self.keep, float):
            raise self._error("share_of", "only a share is one of something; use a float in (0, 1] as keep")
        if self.budget_by == "tiles" and (not in_vision or self.keep == "outliers"):
            raise self._error(
                "budget_by",
                "tiles share a number after the vision encoder; use layer=-1 and an int or a float",
            )

    def _check_options_of_coverage(self) -> None:
        if self.per_region is not None:
            if not is_int(self.per_region) or self.per_region < 1:
                raise self._error("per_region", "expected an int >= 1, or None")
            if self.coverage != "region":
                raise self._error("per_region", "only coverage='region' has candidates; leave it out")
        if self.spread is not None:
            if self.coverage != "stride":
                raise self._error("spread", "only coverage='stride' spreads a part evenly; leave it out")
            if is_int(self.spread) and self.spread in (0, 1):
                object.__setattr__(self, "spread", float(self.spread))
            if not isinstance(self.spread, float) or not 0.0 <= self.spread <= 1.0:
                raise self._error("spread", "expected a float in [0, 1], or None")

    def _error(self, name: str, expected: str, context: str = "") -> ValueError:
        return ValueError(f"{type(self).__name__}.{name}={shown(getattr(self, name))}{context}: {expected}")

    def _check_option(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            raise self._error(name, f"expected one of {_joined(allowed)}")

    def _check_keep(self) -> None:
        if is_int(self.keep):
            if self.keep < 1:
                raise self._error("keep", "an int counts the tokens kept and must be >= 1")
        elif isinstance(self.keep, str) and self.keep == "outliers":
            return
        elif not isinstance(self.keep, float) or not 0.0 < self.keep <= 1.0:
            raise self._error(
                "keep", "expected a float in (0, 1] (a share), an int >= 1 (a count) or 'outliers'"
            )

    def count(self, visual_tokens: int, left: int | None = None) -> int:
        """Return the number of visual tokens that survive.

        A share is read as the decimal that was written, so ``keep=0.7`` of 10 is 7 and not 8.

        Args:
            visual_tokens: The number of unpruned ones.
            left: How many of them the stages before left; None = all.

        Raises:
            ValueError: ``keep`` is ``"outliers"``, whose number depends on the scores.
        """
        left = visual_tokens if left is None else left
        if isinstance(self.keep, str):
            raise self._error("keep", "how many tokens that is depends on their scores")
        if is_int(self.keep):
            return min(self.keep, left)
        numerator, denominator = as_ratio(self.keep)
        if self.share_of == "left":
            return max(numerator * left // denominator, min(left, 1))
        return min(-(-numerator * visual_tokens // denominator), left)


@dataclass(frozen=True)
class GapConfig(Stage):
    """How visual tokens are chosen and which position ids the survivors carry.

    ``keep``, ``layer``, ``score``, ``coverage``, ``exponent`` and ``merge`` are those of the first place at which tokens are
    dropped, as in `Stage`; ``then`` adds more. `GapConfig.preset` gives the methods of the field by name. The defaults run
    on every model that can be pruned at that layer, and their score is the best early in the decoder by plain top-k on the
    embedded models (docs/layers.md); `RECOMMENDED` loses less, and launches more.

    Attributes:
        ids: Which position ids the survivors carry in the later layers. ``"kept"`` is GAP (arXiv 2506.21873): each
            survivor, the text after it and every generated token keep the id that they have without pruning.
            All others are for measuring what they break. ``"compacted"`` numbers the survivors 0, 1, 2, ... (on every axis,
            where a model has several): the value of ids is lost. ``"reordered"`` has the visual survivors in score order,
            with the ids that they have together, ascending: the order is lost. ``"permuted"`` is both. These are the defects
            that the paper names, which it also looks at with nothing dropped: ``keep=1.0`` with any of these is not the
            unpruned model. ``"stretched"`` moves those of each run of visual tokens apart, in proportion, until the last
            survivor has the id of the last token (RPME, Algorithm 3 of Nüwa).
        seed: Seed of ``score="random"``. What is drawn for a sample depends on the seed, the stage and the number of its
            visual tokens alone: not on the batch, nor on padding, and samples of equally many tokens keep the same ones.
        then: Further stages, at later and later layers, each of which keeps some of what the one before kept.

    Raises:
        ValueError: A field is out of range or of the wrong type, or does not go with another; the message names the
            field, the value and what is allowed.
    """

    ids: Ids = "kept"
    seed: int = 0
    then: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ids", "seed"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        self._check_option("ids", get_args(Ids))
        if not is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise self._error("seed", "expected an int in 0..2**63 - 1")
        object.__setattr__(self, "then", _as_tuple(self.then))
        if not isinstance(self.then, tuple) or not all(type(stage) is Stage for stage in self.then):
            raise self._error("then", "expected a tuple of gap_triton.Stage")
        if self.share_of == "left":
            raise self._error(
                "share_of", "nothing is left before the first stage but the prompt; leave it out"
            )
        if self.then and self.ids in ("permuted", "reordered"):
            raise self._error(
                "ids", "score order is defined for one stage; leave then out, or use 'compacted'"
            )
        for before, after in pairwise(self.stages):
            if after.layer <= before.layer:
                raise self._error(
                    "then", f"layers must increase, and {shown(after.layer)} follows {shown(before.layer)}"
                )
            comparable = (
                isinstance(after.keep, type(before.keep)) and after.share_of == before.share_of == "prompt"
            )
            if comparable and after.keep > before.keep:  # type: ignore[operator]
                fault = f"keep={shown(after.keep)} follows {shown(before.keep)}"
                raise self._error("then", f"a stage can't keep more than the one before, and {fault}")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, the first one included."""
        first = object.__new__(
            Stage
        )  # its fields have been checked already, which takes longer than all the rest
        for name in STAGE_FIELDS:
            object.__setattr__(first, name, getattr(self, name))
        return (first, *self.then)

    @property
    def changes_nothing(self) -> bool:
        """Whether no stage drops anything, of whatever prompt, and all tokens keep their ids."""
        keeps_everything = all(isinstance(stage.keep, float) and stage.keep == 1.0 for stage in self.stages)
        return keeps_everything and self.ids == "kept"

    @classmethod
    def preset(cls, name: str, *, model: Any = None, **options: Any) -> GapConfig:
        """Return the configuration of a published method, by name and ``budget``: see `gap_triton.presets.preset`.

        Example: ``GapConfig.preset("nuwa", budget=64, model=model)``.
        """
        from .presets import preset

        return preset(name, model=model, **options)


def first_later(layer: int) -> int:
    """Return the index of the first later layer, the first that lacks what is dropped at ``layer``."""
    return layer + 1


def needs_text(stage: Stage) -> bool:
    """Return whether what ``stage`` keeps depends on the text of the prompt."""
    # Where visual tokens attend to the text behind them, so do their hidden states.
    by_hidden_states = stage.layer != BEFORE_THE_DECODER and stage.coverage in BY_FEATURES
    return stage.score in TEXT_SCORES or by_hidden_states


def needs_grid(stage: Stage) -> bool:
    """Return whether ``stage`` needs the position of each visual token in its image."""
    spreads = stage.coverage in GRID_COVERAGES or stage.score == "spatial"
    if stage.layer != BEFORE_THE_DECODER:
        return spreads
    return (
        spreads
        or stage.budget_by == "tiles"
        or stage.merge not in ("none", "average", "cluster")
        or stage.score not in ("random", "text_similarity")
    )


def _as_tuple(values: object) -> object:
    """What can be gone through as a tuple, for it may be a generator, which can't be gone through twice."""
    try:
        return tuple(iter(values))  # type: ignore[call-overload]
    except TypeError:
        return values


def _joined(values: tuple[str, ...]) -> str:
    return ", ".join(map(repr, values))


RECOMMENDED = GapConfig(coverage="coverage_gain")
"""What lost least in the decoder on the embedded models: tokens that stand for the others, weighed by the text's attention.

It is not the default, which selects in the launch that scores: this compares hidden states, one token after another, and
adds 14 launches to a prefill (docs/choosing.md). ``dataclasses.replace(RECOMMENDED, keep=0.25)`` sets another budget.
"""
