"""A decoder's attention that does not call the attention interface of transformers."""

from __future__ import annotations

from transformers.models.llama import modeling_llama


class OwnAttention(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return hidden_states, None
