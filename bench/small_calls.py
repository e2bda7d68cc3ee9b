"""Every operator once, on small shapes, for compute-sanitizer to watch: ``python -m bench.small_calls DEVICE``.

Prints a final line, so that a run which stopped on the way can't pass for a clean one.
"""

from __future__ import annotations

import sys

import torch

from bench.operators import DECODER_CALLS, TOWER_CALLS
from bench.sanitizer import FINAL_LINE
from bench.shapes import TINY_DECODER, TINY_TOWER, Case, Shape, make_inputs

SMALL_DECODER = Shape("small", 300, 20, 4, 2, 64, 200)
"""Several tiles of keys and of visual tokens, none of them whole at the end."""

SMALL_TOWER = Shape("small-tower", 150, 0, 2, 2, 72, 0)


def main() -> None:
    """Call them all, in both dtypes, and wait for each."""
    # Without gap_triton, as importing transformers takes long under a sanitizer.
    device = torch.device(sys.argv[1])
    for dtype in (torch.bfloat16, torch.float32):
        for shapes, calls in (
            ((TINY_DECODER, SMALL_DECODER), DECODER_CALLS),
            ((TINY_TOWER, SMALL_TOWER), TOWER_CALLS),
        ):
            for shape in shapes:
                x = make_inputs(Case(shape, 2), dtype, device)
                for name, call in calls.items():
                    call(x)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    print(f"{name}, {shape.name}, {dtype}", flush=True)
    print(FINAL_LINE, flush=True)


if __name__ == "__main__":
    main()
