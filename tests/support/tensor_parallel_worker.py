"""One of the processes of `test_ways_parallel.py`: ``torchrun --module support.tensor_parallel_worker FOLDER MODEL``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import gap_triton
from gap_triton.prefill import scores
from support.comparison import TOLERANCE, error
from support.tiny import generate
from support.ways import CONFIG, V5, make, pair


def load(folder: str) -> transformers.PreTrainedModel:
    """The model of ``folder``, its heads split over all processes."""
    sharding: dict[str, object] = {"tp_plan": "auto"}
    if V5:
        from transformers.distributed import DistributedConfig

        sharding = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)}
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="gap_triton", **sharding
    )
    gap_triton.configure(model, CONFIG)
    return model


def main(folder: str, name: str) -> None:
    model, (whole, _, _) = load(folder), pair(name)
    inputs = make(name, "ragged-images")
    expected = generate(whole, inputs)
    kept = gap_triton.last_selection(whole)
    heads = []
    observe = scores.visual_importance
    scores.visual_importance = lambda query, *args, **kwargs: (
        heads.append(query.shape[1]) or observe(query, *args, **kwargs)
    )
    actual = generate(model, inputs)
    selection = gap_triton.last_selection(model)
    assert heads == [whole.config.get_text_config().num_attention_heads // 2]
    assert torch.equal(selection.index, kept.index)
    torch.testing.assert_close(selection.score, kept.score)
    assert torch.equal(actual.sequences, expected.sequences)
    assert error(actual, expected) <= TOLERANCE

    everywhere = [torch.empty_like(selection.score) for _ in range(2)]
    dist.all_gather(everywhere, selection.score)
    assert torch.equal(*everywhere)  # to the bit, so that ties fall alike

    # Without the reduction each process would keep other tokens, which is what this test is there to see.
    scores.mean_over_ranks = lambda local, group: local
    generate(model, inputs, tokens=1)
    local = gap_triton.last_selection(model).index
    everywhere = [torch.empty_like(local) for _ in range(2)]
    dist.all_gather(everywhere, local)
    assert not torch.equal(*everywhere)


if __name__ == "__main__":
    main(*sys.argv[1:])
    (Path(sys.argv[1]) / f"passed-{dist.get_rank()}").touch()
    dist.barrier()
    dist.destroy_process_group()
