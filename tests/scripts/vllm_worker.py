"""Run one engine of vLLM: ``vllm_worker.py JOB RESULT``, both pickled; see `support.serving.ask`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

METRICS = ("vllm:prefix_cache_hits", "vllm:num_preemptions")


def counted(engine: Any) -> dict[str, int]:
    """The counters of ``engine`` since it started."""
    values = dict.fromkeys(METRICS, 0)
    for metric in engine.get_metrics():
        if metric.name in values:
            values[metric.name] += metric.value
    return values


def watch_the_tower() -> list[int]:
    """A list that gets the number of tokens that go through the vision tower at a time, where it is in this process."""
    from gap_triton.vllm.model import GapModel

    encoded: list[int] = []
    encode = GapModel._encode

    def watched(model: Any, fields: Any, plans: Any, layouts: Any) -> Any:
        encoded.append(sum(layout.counts[0] for layout in layouts))
        return encode(model, fields, plans, layouts)

    GapModel._encode = watched  # type: ignore[method-assign]
    return encoded


def main(job: Path, result: Path) -> None:
    """Answer all calls of a job."""
    from vllm import LLM, SamplingParams

    arguments, length, calls = pickle.loads(job.read_bytes())
    encoded = watch_the_tower()
    engine = LLM(disable_log_stats=False, **arguments)
    sampling = SamplingParams(temperature=0.0, max_tokens=length)
    answers = []
    for requests in calls:
        before, encoded[:] = counted(engine), []
        prompts = [
            {
                "prompt": request.text,
                "multi_modal_data": request.data,
                "mm_processor_kwargs": {f"gap_{name}": value for name, value in request.options.items()},
            }
            for request in requests
        ]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        after = counted(engine)
        hits, preemptions = (after[name] - before[name] for name in METRICS)
        answers.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
                "hits": hits,
                "preemptions": preemptions,
                "encoded": list(encoded),
            }
        )
    result.write_bytes(pickle.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
