"""The oracle: nothing is ever dropped; layers after the pruning layer mask the columns that pruning would have dropped.

It shares no code with the package: eager attention in float32, selection by Python loops, masks by comparing positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from types import TracebackType

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from .tiny import IMAGE, VIDEO

NAME = "masking_oracle"
_active: list[MaskingOracle] = []


def _attention(module, query, key, value, attention_mask, scaling=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).float() for x in (key, value))
    logits = query.float() @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        logits = logits + attention_mask[..., : key.shape[2]]
    if _active and module in _active[-1].attentions:
        logits = _active[-1].mask_dropped(module.layer_idx, logits)
    probabilities = logits.softmax(-1)
    if _active and module in _active[-1].attentions:
        _active[-1].look(module.layer_idx, probabilities)
    return (probabilities @ value).transpose(1, 2).to(query.dtype), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


def core_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The module that sees ``input_ids``, and the decoder stack below it."""
    for names in (("language_model", "text_model"), ("model",)):
        for module in model.modules():
            for name in names:
                child = getattr(module, name, None)
                # Some hold the decoder with its language-model head around it.
                inside = getattr(child, "model", None) if name != "model" else None
                for text in (child, inside):
                    if isinstance(getattr(text, "layers", None), nn.ModuleList):
                        return module, text
    raise LookupError(type(model).__name__)


class MaskingOracle:
    """Runs ``model`` (built with the implementation `NAME` for its text model) with dropped columns masked.

    Attributes:
        dropped: [B, T] bool, by original position, over all turns so far: what the first stage dropped.
        later: The same for each stage of ``then``, without what the stages before it dropped.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer: int,
        keep: float | int,
        score: str = "text",
        chosen: torch.Tensor | None = None,
        then: Sequence[tuple[int, float | int, str] | tuple[int, torch.Tensor]] = (),
        answer: int = 0,
    ) -> None:
        """With ``chosen`` [B, N] bool, those of the first N tokens are dropped and nothing is scored.

        ``then`` has further stages: layer, keep and score, or layer and the tokens that are dropped. The last ``answer``
        rows of a prefill rank nothing.
        """
        self.chosen = chosen
        self.answer = answer
        self.padding: torch.Tensor | None = (
            None  # [B, Q] bool, the real rows, where no mask of two dimensions says so
        )
        self.then = then
        self.layer, self.keep, self.score = layer, keep, score
        self.owner, text = core_of(model)
        self.attentions = {module for module in text.modules() if hasattr(module, "layer_idx")}
        self.dropped: torch.Tensor | None = None
        self.visual: torch.Tensor | None = None

    def __enter__(self) -> MaskingOracle:
        self.handle = self.owner.register_forward_pre_hook(self._begin, with_kwargs=True)
        _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.handle.remove()
        _active.remove(self)

    def _begin(self, module, args, kwargs):
        ids, embeds = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is not None:
            visual = (ids == IMAGE) | (ids == VIDEO)
        else:
            table = module.get_input_embeddings().weight
            visual = (embeds == table[IMAGE]).all(-1)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self.past = 0 if cache is None else int(cache.get_seq_length())
        if self.past == 0:
            self.dropped = torch.zeros(visual.shape[0], 0, dtype=torch.bool)
            self.later = [self.dropped] * len(self.then)
        batch, queries = visual.shape
        new = torch.zeros(batch, queries, dtype=torch.bool)
        self.dropped = torch.cat([self.dropped, new], 1)
        self.later = [torch.cat([dropped, new], 1) for dropped in self.later]
        mask = kwargs.get("attention_mask")
        self.real = (
            mask[:, -queries:].bool()
            if mask is not None and mask.dim() == 2
            else torch.ones(batch, queries, dtype=torch.bool)
            if self.padding is None
            else self.padding
        )
        self.visual = visual if queries > 1 else torch.zeros_like(visual)
        if self.chosen is not None:
            self._tell(self.dropped, self.chosen)
        for stage, dropped in zip(self.then, self.later, strict=True):
            if len(stage) == 2:
                self._tell(dropped, stage[1])

    @staticmethod
    def _tell(dropped: torch.Tensor, chosen: torch.Tensor) -> None:
        width = min(dropped.shape[1], chosen.shape[1])
        dropped[:, :width] = chosen[:, :width]

    def dropped_before(self, layer: int) -> torch.Tensor:
        """[B, T] bool, what all stages before decoder layer ``layer`` dropped."""
        assert self.dropped is not None
        dropped = self.dropped & (layer > self.layer)
        for stage, more in zip(self.then, self.later, strict=True):
            dropped = dropped | (more & (layer > stage[0]))
        return dropped

    def mask_dropped(self, layer: int, logits: torch.Tensor) -> torch.Tensor:
        dropped = self.dropped_before(layer)
        keys = logits.shape[-1]
        assert keys <= dropped.shape[1]
        columns = dropped[:, dropped.shape[1] - keys :]
        return logits.masked_fill(columns[:, None, None, :], torch.finfo(logits.dtype).min)

    def look(self, layer: int, probabilities: torch.Tensor) -> None:
        assert self.visual is not None
        if not self.visual.any():
            return
        if layer == self.layer and self.chosen is None:
            assert self.dropped is not None
            self._drop(probabilities, self.keep, self.score, self.dropped)
        for stage, dropped in zip(self.then, self.later, strict=True):
            if layer == stage[0] and len(stage) == 3:
                self._drop(probabilities, stage[1], stage[2], dropped, self.dropped_before(layer))

    def _drop(
        self,
        probabilities: torch.Tensor,
        keep: float | int,
        score: str,
        dropped: torch.Tensor,
        before: torch.Tensor | None = None,
    ) -> None:
        assert self.visual is not None
        batch, queries = self.visual.shape
        offset = probabilities.shape[-1] - queries
        for b in range(batch):
            visual = [i for i in range(queries) if self.visual[b, i]]
            if not visual:
                continue
            share = keep if isinstance(keep, int) else math.ceil(Fraction(str(keep)) * len(visual))
            count = min(share, len(visual))
            prompt = [i for i in range(queries - self.answer) if self.real[b, i]]
            rows = prompt[-1:]
            if score == "text":
                rows = [i for i in prompt if i > visual[-1]] or rows
            left = [i for i in visual if before is None or not before[b, self.past + i]]
            mean = probabilities[b].mean(0)
            scores = {i: sum(float(mean[r, offset + i]) for r in rows) / len(rows) for i in left}
            chosen = sorted(left, key=lambda i: (-scores[i], i))[:count]
            for i in left:
                if i not in chosen and i != queries - 1:
                    dropped[b, self.past + i] = True
