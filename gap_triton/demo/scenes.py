"""Seeded scenes of coloured shapes, each with an expression that names one of them and the box of the named thing.

Everything is drawn by torch alone, a whole batch at once, so that a training step never waits for its data.

The split is by seed. A batch is a function of one integer: training uses the seeds below ``HELD_OUT_SEED``,
held-out scenes the seeds from it on, so no held-out scene was drawn from a training stream. These are split again, see
`SPLITS`: what something was chosen by can't also say how good it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

GRID = 8  # visual tokens along each side
PATCH = 8  # pixels along each side of a visual token
IMAGE_SIZE = GRID * PATCH

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
RGB = ((235, 40, 40), (40, 210, 60), (60, 90, 245), (235, 220, 40))

MOST_OBJECTS = 4
SMALLEST, LARGEST = 16, 28  # side of an object in pixels: 2 to 3.5 patches
GAP = 2  # pixels of background between any two boxes, at least
NOISE = 56  # background pixels are uniform in [0, NOISE)

HELD_OUT_SEED = 3 * 2**30  # scenes of the seeds just above 2**31 were looked at while the design was chosen
Split = Literal["development", "choice", "report", "sealed"]
SPLITS: dict[Split, int] = {
    "development": HELD_OUT_SEED,
    "choice": HELD_OUT_SEED + 2**28,
    "report": HELD_OUT_SEED + 2**29,
    "sealed": HELD_OUT_SEED + 3 * 2**28,
}
"""First seed of each split; it ends where the next one begins.

``"development"``: tests, and what was looked at while methods were written. ``"choice"``: what defaults are chosen by.
``"report"``: the tables of the docs; nothing was chosen by it. ``"sealed"``: used by nothing, for one last check.
"""
LARGEST_SEED = 2**32 - 1  # torch's CPU generator reads 32 bits of a seed
_HELD_OUT_CHUNK = 64
_PLACEMENTS = 48  # random placements tried per object


@dataclass(frozen=True)
class Scenes:
    """A batch of ``N`` scenes, ``M = MOST_OBJECTS`` object slots each.

    Attributes:
        images: [N, 3, IMAGE_SIZE, IMAGE_SIZE] uint8, RGB.
        colours: [N, M] int64, index into ``COLOURS``.
        shapes: [N, M] int64, index into ``SHAPES``. No (colour, shape) pair occurs twice in a scene.
        boxes: [N, M, 4] int64, pixels ``x0 y0 x1 y1``; the far edges are exclusive.
        present: [N, M] bool, whether the slot holds an object. Slot 0 always does.
        target: [N] int64, the slot that the scene's expression names.
        owners: [N, GRID, GRID] int64, the slot whose object covers the centre of each patch; ``M`` for none.
    """

    images: Tensor
    colours: Tensor
    shapes: Tensor
    boxes: Tensor
    present: Tensor
    target: Tensor
    owners: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Scenes:
        return Scenes(
            self.images[rows],
            self.colours[rows],
            self.shapes[rows],
            self.boxes[rows],
            self.present[rows],
            self.target[rows],
            self.owners[rows],
        )

    @property
    def target_boxes(self) -> Tensor:
        """Box of each scene's named object: [N, 4] int64, pixels."""
        return self.boxes[torch.arange(len(self)), self.target]

    def name(self, index: int, slot: int | None = None) -> str:
        """Return the colour and shape of one object, by default of the named one: ``"red triangle"``."""
        slot = int(self.target[index]) if slot is None else slot
        return f"{COLOURS[int(self.colours[index, slot])]} {SHAPES[int(self.shapes[index, slot])]}"

    def question(self, index: int, slot: int | None = None) -> str:
        """Return the expression that names one object, by default the target: ``"where is the red triangle?"``."""
        return f"where is the {self.name(index, slot)}?"

    def image(self, index: int) -> Image.Image:
        """Return one scene as an RGB image of the model's native size."""
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy(), mode="RGB")


def draw(count: int, seed: int, *, fewest: int = 2, most: int = MOST_OBJECTS) -> Scenes:
    """Draw ``count`` scenes of ``fewest`` to ``most`` objects; the same arguments always give the same scenes.

    An object that finds no free place in ``_PLACEMENTS`` tries is left out, so a crowded scene may hold fewer.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed is {seed}; it must be in 0..{LARGEST_SEED}")
    if not 1 <= fewest <= most <= MOST_OBJECTS:
        raise ValueError(
            f"fewest, most are {fewest}, {most}; they must satisfy 1 <= fewest <= most <= {MOST_OBJECTS}"
        )
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.rand(count, len(COLOURS) * len(SHAPES), generator=generator).argsort(1)[:, :MOST_OBJECTS]
    colours, shapes = pairs // len(SHAPES), pairs % len(SHAPES)
    counts = torch.randint(fewest, most + 1, (count,), generator=generator)
    boxes, present = _place_boxes(counts, generator)
    images, owners = _paint(boxes, present, colours, shapes, generator)
    # Absent slots get no weight, so the target is uniform over the objects that are really there.
    target = torch.multinomial(present.float(), 1, generator=generator)[:, 0]
    return Scenes(images, colours, shapes, boxes, present, target, owners)


def held_out(count: int, split: Split = "development") -> Scenes:
    """Return the first ``count`` held-out scenes of a split. A smaller count gives a prefix of a larger one."""
    chunks = [draw(_HELD_OUT_CHUNK, seed) for seed in seeds_of(count, split)]
    fields = ("images", "colours", "shapes", "boxes", "present", "target", "owners")
    return Scenes(*(torch.cat([getattr(chunk, field) for chunk in chunks])[:count] for field in fields))


def seeds_of(count: int, split: Split) -> range:
    """Return the seeds that the first ``count`` scenes of a split are drawn from.

    Raises:
        ValueError: There is no such split, or it has not as many scenes.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(map(repr, SPLITS))}")
    first = SPLITS[split]
    most = (min((seed for seed in SPLITS.values() if seed > first), default=LARGEST_SEED + 1) - first) * (
        _HELD_OUT_CHUNK
    )
    if not 1 <= count <= most:
        raise ValueError(f"count is {count}; it must be at least 1, and at most {most}")
    return range(first, first - (-count // _HELD_OUT_CHUNK))


def _place_boxes(counts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose boxes that keep ``GAP`` pixels apart: [N, M, 4] int64, and which slots got one: [N, M] bool."""
    count = len(counts)
    rows = torch.arange(count)
    boxes = torch.zeros(count, MOST_OBJECTS, 4, dtype=torch.int64)
    present = torch.zeros(count, MOST_OBJECTS, dtype=torch.bool)
    for slot in range(MOST_OBJECTS):
        side = torch.randint(SMALLEST, LARGEST + 1, (count, _PLACEMENTS), generator=generator)
        corner = torch.rand(count, _PLACEMENTS, 2, generator=generator) * (IMAGE_SIZE - side + 1)[..., None]
        low = corner.long()
        high = low + side[..., None]
        # Two boxes are apart when a gap separates them along x or along y.
        apart_below = high[:, :, None] + GAP <= boxes[:, None, :slot, :2]
        apart_above = boxes[:, None, :slot, 2:] + GAP <= low[:, :, None]
        free = ((apart_below | apart_above).any(-1) | ~present[:, None, :slot]).all(-1)
        first = free.int().argmax(1)
        present[:, slot] = free.any(1) & (slot < counts)
        box = torch.cat([low[rows, first], high[rows, first]], 1)
        boxes[:, slot] = box * present[:, slot, None]
    return boxes, present


def _paint(
    boxes: Tensor, present: Tensor, colours: Tensor, shapes: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Paint every present object on a noisy dark background; returns ``images`` and ``owners`` of ``Scenes``."""
    size = (len(boxes), 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, NOISE, size, generator=generator, dtype=torch.uint8)
    rgb = torch.tensor(RGB, dtype=torch.uint8)
    owners = torch.full((len(boxes), IMAGE_SIZE, IMAGE_SIZE), MOST_OBJECTS)
    pixel = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
    for slot in range(MOST_OBJECTS):
        x0, y0, x1, _ = boxes[:, slot].float().unbind(1)
        side = (x1 - x0).clamp(min=1)[:, None]
        u = ((pixel - x0[:, None]) / side * 2 - 1)[:, None, :]  # [N, 1, W], -1..1 inside the box
        v = ((pixel - y0[:, None]) / side * 2 - 1)[:, :, None]  # [N, H, 1]
        square = (u.abs() < 1) & (v.abs() < 1)
        circle = u * u + v * v < 1
        # Wide enough at the apex that two pixels of an even side are in: the top of the box is always touched.
        triangle = square & (u.abs() < (v + 1) / 2 + 0.75 / side[:, :, None])
        shape = shapes[:, slot, None, None]
        mask = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
        mask &= present[:, slot, None, None]
        owners = owners.masked_fill(mask, slot)
        images = torch.where(mask[:, None], rgb[colours[:, slot]][:, :, None, None], images)
    centres = slice(PATCH // 2, None, PATCH)
    return images, owners[:, centres, centres]
