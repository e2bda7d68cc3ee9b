"""The sizes of images, on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Arguments with the number of frames, rows and columns of patches.
GRID_FIELDS = {"image": "image_grid_thw", "video": "video_grid_thw"}
SHAPES = "spatial_shapes"  # rows and columns of patches of each image (LFM2-VL)
POSITIONS = "image_position_ids"  # column and row of each patch, -1 where there is none (Gemma 4)
SIZE_FIELDS = (*GRID_FIELDS.values(), "image_sizes", "batch_num_images", SHAPES, POSITIONS)
HOST_SIZES = "gap_sizes"
"""Among the arguments of a forward: what the host knows of `SIZE_FIELDS`, by name, so that nothing is read."""


def host_sizes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return ``arguments`` with the sizes of images as tuples of ints, or of tuples of ints.

    Args:
        arguments: Of a forward or of an encoder, by name. What is a tuple already stays, and so does what is no size.

    Returns:
        A new dictionary. In the place of positions of patches are the rows and columns of each image. Sizes in tensors are
        read from the device with one read for all; those under `HOST_SIZES`, tuples or lists, are taken from there.
    """
    sizes = {name: arguments[name] for name in SIZE_FIELDS if arguments.get(name) is not None}
    found = {}
    for name, values in (arguments.get(HOST_SIZES) or {}).items():
        # Of what generate() has repeated, the host knows the first.
        if name in sizes and len(values) == len(sizes[name]):
            found[name] = _as_tuples(values)
    tensors = {}
    for name, value in sizes.items():
        if isinstance(value, Tensor):
            tensors[name] = (value.amax(dim=1) + 1).flip(-1) if name == POSITIONS else value
        elif not isinstance(value, tuple):
            found.setdefault(name, _as_tuples(np.asarray(value).tolist()))
    found |= _read({name: value for name, value in tensors.items() if name not in found})
    return {**arguments, **found}


def _read(tensors: dict[str, Tensor]) -> dict[str, Any]:
    if len(tensors) < 2 or len({tensor.device for tensor in tensors.values()}) > 1:
        return {name: _as_tuples(tensor.tolist()) for name, tensor in tensors.items()}
    values = np.array(torch.cat([tensor.flatten() for tensor in tensors.values()]).tolist())
    ends = np.cumsum([tensor.numel() for tensor in tensors.values()])[:-1]
    pieces = zip(tensors.items(), np.split(values, ends), strict=True)
    return {name: _as_tuples(piece.reshape(tensor.shape).tolist()) for (name, tensor), piece in pieces}


def _as_tuples(values: Any) -> Any:
    return tuple(map(_as_tuples, values)) if isinstance(values, (list, tuple)) else values
