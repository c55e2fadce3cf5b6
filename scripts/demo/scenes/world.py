"""Sample scenes (entities and their positions) and render them with exact boxes.

World frame: (x, y), origin at the top-left corner of the centre crop, which is the unit square; the image may be
larger than the crop on its longer side. Every entity lies inside the crop.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from scripts.demo.scenes.backgrounds import add_noise, draw_background
from scripts.demo.scenes.pen import Pen
from scripts.demo.scenes.sprites import SHAPES, draw_entity
from scripts.demo.scenes.vocabulary import ALL_ENTITIES, KINDS, PEOPLE, PLACES, SEEN_ENTITIES, SEEN_SWAPS, SWAPS, Entity

SUPERSAMPLING = 2
MARGIN = 0.015
KIND_WEIGHTS = tuple(2.0 if kind in PEOPLE else 1.0 for kind in KINDS)
ALL_BY_KIND = {kind: [entity for entity in ALL_ENTITIES if entity.kind == kind] for kind in KINDS}
SEEN_BY_KIND = {kind: [entity for entity in SEEN_ENTITIES if entity.kind == kind] for kind in KINDS}


@dataclass(frozen=True)
class Placed:
    """An entity with its position: horizontal centre, y of its feet, and height, in world units."""

    entity: Entity
    x: float
    foot: float
    height: float
    flip: bool

    @property
    def width(self) -> float:
        """Width in world units."""
        return self.height * SHAPES[self.entity.kind][0] / 100

    def extent(self) -> tuple[float, float, float, float]:
        """Nominal (x0, y0, x1, y1) in world units; the drawn sprite may be slightly smaller."""
        return self.x - self.width / 2, self.foot - self.height, self.x + self.width / 2, self.foot


@dataclass(frozen=True)
class Scene:
    """Description of an image, independent of its resolution."""

    place: str
    placed: tuple[Placed, ...]
    seed: int
    aspect: float = 1.0  # width / height of the image

    @property
    def entities(self) -> tuple[Entity, ...]:
        """The entities in the order of `placed` and of the boxes: back to front."""
        return tuple(item.entity for item in self.placed)


def sample_entities(count: int, rng: random.Random, held_out: bool = False) -> list[Entity]:
    """Draw `count` different entities; about half of them differ from an earlier one in exactly one attribute.

    Combinations of `HELD_OUT` are drawn only with `held_out`.
    """
    by_kind, swaps = (ALL_BY_KIND, SWAPS) if held_out else (SEEN_BY_KIND, SEEN_SWAPS)
    chosen: list[Entity] = []
    while len(chosen) < count:
        if chosen and rng.random() < 0.5:
            entity = rng.choice(swaps[rng.choice(chosen)])
        else:
            kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
            entity = rng.choice(by_kind[kind])
        if entity not in chosen:
            chosen.append(entity)
    return chosen


def place_entities(entities: Sequence[Entity], rng: random.Random) -> tuple[Placed, ...] | None:
    """Draw non-overlapping positions for all entities; None if 60 draws for one of them found no free position."""
    crowd = {1: 1.1, 2: 1.03, 3: 0.95, 4: 0.86}.get(len(entities), 0.75)
    placed: list[Placed] = []
    for entity in sorted(entities, key=lambda item: -(SHAPES[item.kind][1] ** 2) * SHAPES[item.kind][0]):
        for _ in range(60):
            item = _draw_place(entity, crowd, rng)
            if item is not None and not any(_overlap(item.extent(), other.extent()) for other in placed):
                placed.append(item)
                break
        else:
            return None
    return tuple(sorted(placed, key=lambda item: item.foot))


def _draw_place(entity: Entity, crowd: float, rng: random.Random) -> Placed | None:
    height = SHAPES[entity.kind][1] * crowd * rng.uniform(0.82, 1.12)
    width = height * SHAPES[entity.kind][0] / 100
    low = max(0.5, MARGIN + height + 0.01)
    if low > 1 - MARGIN or width > 1 - 2 * MARGIN:
        return None
    x = rng.uniform(MARGIN + width / 2, 1 - MARGIN - width / 2)
    return Placed(entity, x, rng.uniform(low, 1 - MARGIN), height, rng.random() < 0.5)


def _overlap(a: Sequence[float], b: Sequence[float], gap: float = 0.012) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def sample_scene(
    rng: random.Random, count: int, aspect: float = 1.0, held_out: bool = False, require: Entity | None = None
) -> Scene:
    """Draw a scene of `count` entities that contains `require`; repeat until all entities fit."""
    while True:
        entities = sample_entities(count, rng, held_out)
        if require is not None and require not in entities:
            swaps = SWAPS if held_out else SEEN_SWAPS
            entities[0] = require
            if count > 1 and rng.random() < 0.7:
                entities[1] = rng.choice(swaps[require])
            if len(set(entities)) < count:
                continue
        placed = place_entities(entities, rng)
        if placed is not None:
            return Scene(rng.choice(tuple(PLACES)), placed, rng.randrange(2**31), aspect)


def image_size(aspect: float, short_side: int) -> tuple[int, int]:
    """(width, height) in pixels of an image with this aspect ratio and short side."""
    if aspect >= 1:
        return round(short_side * aspect), short_side
    return short_side, round(short_side / aspect)


def render(scene: Scene, short_side: int) -> tuple[Image.Image, np.ndarray]:
    """Render the image and the boxes of its entities, in the order of `scene.placed`.

    Boxes: (N, 4) int, (x0, y0, x1, y1) in image pixels, origin top-left, half-open: exactly the visible extent.
    """
    rng = random.Random(scene.seed)
    width, height = image_size(scene.aspect, short_side)
    unit = short_side * SUPERSAMPLING
    canvas_size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    left, top = (canvas_size[0] - unit) // 2, (canvas_size[1] - unit) // 2
    horizon = top + rng.uniform(0.30, 0.46) * unit
    canvas = draw_background(scene.place, canvas_size, unit, horizon, rng)
    noise = rng.uniform(2.0, 7.0), rng.choice((8, 16, 40)), rng.randrange(2**31)
    canvas = add_noise(canvas, *noise)
    _shadows(canvas, scene, unit, (left, top))
    boxes = [_stamp(canvas, item, unit, (left, top), rng) for item in scene.placed]
    image = canvas.reduce(SUPERSAMPLING)
    light = rng.uniform(0.92, 1.06)
    return image.point(lambda level: min(255, int(level * light))), np.array(boxes, dtype=np.int64).reshape(-1, 4)


def _shadows(canvas: Image.Image, scene: Scene, unit: float, corner: tuple[int, int]) -> None:
    """A soft shadow under every entity, darkening the ground; it is not part of the entity's box."""
    mask = Image.new("L", canvas.size, 0)
    draw = ImageDraw.Draw(mask)
    for item in scene.placed:
        x, y = corner[0] + item.x * unit, corner[1] + (item.foot - 0.012 * item.height) * unit
        rx, ry = item.width * 0.46 * unit, min(0.10 * item.width, 0.02) * unit
        draw.ellipse([x - rx, y - ry, x + rx, y + ry], fill=70)
    canvas.paste((30, 30, 40), (0, 0, *canvas.size), mask)


def _stamp(
    canvas: Image.Image, item: Placed, unit: float, corner: tuple[int, int], rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw one entity on the canvas; its visible extent in image pixels, half-open."""
    pen = Pen(SHAPES[item.entity.kind][0], item.height * unit / 100, item.flip)
    draw_entity(pen, item.entity, rng)
    x0, y0, x1, y1 = pen.layer.getbbox()
    sprite = pen.layer.crop((x0, y0, x1, y1))
    left = round(corner[0] + item.x * unit - (x1 - x0) / 2)
    top = round(corner[1] + item.foot * unit - (y1 - y0))
    canvas.paste(sprite, (left, top), sprite)
    k = SUPERSAMPLING
    return left // k, top // k, -(-(left + x1 - x0) // k), -(-(top + y1 - y0) // k)
