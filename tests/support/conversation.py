"""Several turns on one cache."""

from __future__ import annotations

import torch
import transformers

from .tiny import IMAGE, Image, pixels
from .ways import MROPE


def next_turn(sequences: torch.Tensor, mask: torch.Tensor, images: int, seed: int, pad: int = 0):
    """The conversation so far, then words, ``images`` images each followed by a word, words; ``pad`` on the left."""
    generator = torch.Generator().manual_seed(seed)
    batch = sequences.shape[0]
    turn = [torch.randint(5, 140, (batch, 4), generator=generator)]
    for _ in range(images):
        turn += [torch.full((batch, 36), IMAGE), torch.randint(5, 140, (batch, 3), generator=generator)]
    turn = torch.cat(turn, 1)
    new_mask = torch.ones(batch, sequences.shape[1] - mask.shape[1] + turn.shape[1], dtype=torch.long)
    if pad:  # the first sample's turn is shorter
        turn[0, :pad] = 0
        new_mask[0, sequences.shape[1] - mask.shape[1] :][:pad] = 0
    inputs = {"input_ids": torch.cat([sequences, turn], 1), "attention_mask": torch.cat([mask, new_mask], 1)}
    if images:
        inputs |= pixels("llava", [Image()] * images * batch, generator)
    return inputs


class Conversation:
    """One model, its cache, and the mask and the ids of everything that has gone through it."""

    def __init__(self, model, inputs: dict[str, torch.Tensor], cache=None) -> None:
        self.model = model
        self.cache = cache or transformers.DynamicCache(config=model.config.get_text_config())
        self.mask = inputs["attention_mask"]
        with torch.no_grad():
            self.logits = [model(**inputs, past_key_values=self.cache).logits[:, -1:]]

    def go_on(self, *blocks: int) -> None:
        """Blocks of words, one column of them the same for all samples."""
        for seed, rows in enumerate(blocks):
            words = torch.randint(5, 140, (rows,), generator=torch.Generator().manual_seed(seed))
            batch, past = self.mask.shape
            self.mask = torch.cat([self.mask, torch.ones(batch, rows, dtype=torch.long)], 1)
            position_ids = (self.mask.cumsum(1) - 1).clamp(min=0)[:, past:]
            if self.model.config.model_type == MROPE:
                position_ids = position_ids.expand(3, -1, -1)
            with torch.no_grad():
                output = self.model(
                    input_ids=words.expand(batch, -1),
                    attention_mask=self.mask,
                    position_ids=position_ids,
                    past_key_values=self.cache,
                )
            self.logits.append(output.logits)
