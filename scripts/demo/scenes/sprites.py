"""Draw animals and objects; proportions and size of every sprite.

Design frame as in `pen.py`: 100 units high; animals and vehicles face right unless the pen is flipped.
"""

from __future__ import annotations

import random

from scripts.demo.scenes.pen import INK, Colour, Pen, shade
from scripts.demo.scenes.people import PERSON_WIDTH, draw_person
from scripts.demo.scenes.vocabulary import PEOPLE, Entity

PAINT: dict[str, Colour] = {
    "red": (214, 36, 40),
    "blue": (40, 92, 214),
    "green": (40, 156, 66),
    "yellow": (248, 210, 36),
    "black": (40, 38, 44),
    "white": (246, 246, 242),
    "purple": (136, 56, 176),
    "orange": (246, 130, 24),
    "pink": (248, 138, 188),
    "brown": (134, 82, 44),
    "grey": (146, 148, 154),
}
# Design width for a height of 100, and the height in the world (short side of the image = 1) at full size.
SHAPES: dict[str, tuple[float, float]] = {
    "man": (PERSON_WIDTH, 0.60),
    "woman": (PERSON_WIDTH, 0.58),
    "boy": (PERSON_WIDTH, 0.42),
    "girl": (PERSON_WIDTH, 0.42),
    "dog": (118, 0.25),
    "cat": (104, 0.22),
    "horse": (118, 0.40),
    "car": (205, 0.23),
    "bicycle": (152, 0.28),
    "ball": (100, 0.17),
    "tree": (72, 0.58),
    "umbrella": (96, 0.42),
}
TYRE: Colour = (44, 44, 50)


def draw_entity(pen: Pen, entity: Entity, rng: random.Random) -> None:
    """Draw `entity` in a slightly varied colour."""
    colour = tuple(min(255, max(0, channel + rng.randint(-9, 9))) for channel in PAINT[entity.colour])
    if entity.kind in PEOPLE:
        draw_person(pen, entity.kind, entity.garment, colour, rng)
    else:
        DRAW[entity.kind](pen, colour)


def _dog(pen: Pen, colour: Colour) -> None:
    dark = shade(colour, 0.62)
    pen.limb([(20, 48), (8, 26)], colour, 7)
    for x in (26, 38, 72, 84):
        pen.limb([(x, 64), (x, 95)], dark if x in (38, 72) else colour, 9)
    pen.ellipse(54, 56, 38, 19, colour)
    pen.ellipse(90, 36, 19, 18, colour)
    pen.ellipse(106, 43, 11, 8, shade(colour, 1.3))
    pen.ellipse(115, 40, 3.2, 3, INK, None)
    pen.ellipse(79, 40, 7, 17, dark)
    pen.ellipse(94, 31, 2.4, 3, INK if sum(colour) > 200 else (240, 240, 240), None)
    pen.line([(78, 54), (96, 56)], (205, 60, 60) if colour[0] < 190 else (60, 90, 190), 4)


def _cat(pen: Pen, colour: Colour) -> None:
    dark = shade(colour, 0.62)
    pen.limb([(18, 78), (6, 58), (12, 30), (22, 24)], colour, 7)
    pen.ellipse(46, 74, 32, 23, colour)
    for x in (30, 44, 62, 74):
        pen.limb([(x, 82), (x, 96)], colour, 8)
    for tip, base in ((58, 54), (94, 98)):
        pen.polygon([(base, 34), (tip, 8), (76, 24)], colour)
    pen.ellipse(76, 42, 23, 20, colour)
    for x in (67, 85):
        pen.ellipse(x, 40, 4.2, 5, (168, 214, 70))
        pen.ellipse(x, 40, 1.5, 4, INK, None)
    pen.polygon([(73, 48), (79, 48), (76, 52)], (236, 130, 140))
    for x in (30, 40, 50):
        pen.line([(x, 54), (x + 2, 66)], dark, 3)
    for side in (-1, 1):
        pen.line([(76 + side * 6, 53), (76 + side * 24, 50)], dark, 1.2)


def _horse(pen: Pen, colour: Colour) -> None:
    dark = shade(colour, 0.5)
    pen.limb([(14, 46), (6, 76)], dark, 8)
    for x in (24, 35, 70, 80):
        pen.limb([(x, 60), (x, 92)], shade(colour, 0.75) if x in (35, 70) else colour, 7.5)
        pen.box(x - 4.5, 92, x + 4.5, 99, INK)
    pen.ellipse(50, 52, 38, 17, colour)
    pen.polygon([(66, 48), (84, 12), (98, 20), (88, 58)], colour)
    pen.polygon([(84, 8), (96, 8), (116, 30), (110, 38), (92, 32)], colour)
    pen.polygon([(84, 10), (88, 0), (92, 9)], colour)
    pen.limb([(82, 10), (70, 30), (64, 44)], dark, 6)
    pen.ellipse(97, 18, 2.2, 2.6, INK if sum(colour) > 200 else (240, 240, 240), None)


def _car(pen: Pen, colour: Colour) -> None:
    pen.polygon([(42, 42), (68, 6), (134, 6), (164, 42)], colour)
    glass = (188, 224, 240)
    pen.polygon([(56, 40), (74, 14), (98, 14), (98, 40)], glass)
    pen.polygon([(106, 40), (106, 14), (130, 14), (150, 40)], glass)
    pen.box(4, 40, 201, 82, colour, radius=12)
    pen.box(188, 50, 201, 62, (255, 236, 150))
    pen.box(4, 50, 12, 64, (190, 40, 40))
    pen.line([(102, 44), (102, 78)], shade(colour, 0.6), 2.5)
    for x in (50, 156):
        pen.ellipse(x, 80, 19, 19, TYRE)
        pen.ellipse(x, 80, 9, 9, (206, 208, 212))


def _bicycle(pen: Pen, colour: Colour) -> None:
    for x in (32, 120):
        pen.ring(x, 68, 31, 5.5, TYRE)
        for dx, dy in ((20, 20), (20, -20), (28, 0), (0, 28)):
            pen.line([(x - dx, 68 - dy), (x + dx, 68 + dy)], (150, 150, 156), 1.4)
    frame = [(32, 68), (54, 30), (104, 28), (74, 68), (32, 68)]
    pen.line(frame, colour, 9)
    pen.line([(54, 30), (74, 68)], colour, 9)
    pen.line([(120, 68), (100, 12)], colour, 9)
    pen.line([(88, 12), (102, 12), (112, 4)], INK, 5)
    pen.line([(54, 30), (49, 18)], INK, 4)
    pen.ellipse(49, 17, 12, 4.5, INK)
    pen.ellipse(74, 68, 6, 6, (90, 90, 96))


def _ball(pen: Pen, colour: Colour) -> None:
    pen.ellipse(50, 50, 48, 48, colour)
    pen.chord(50, 50, 48, 48, 20, 160, shade(colour, 0.72))
    pen.ellipse(50, 52, 47, 15, (250, 250, 248))
    pen.ellipse(33, 26, 10, 7, shade(colour, 1.6), None)


def _tree(pen: Pen, colour: Colour) -> None:
    pen.polygon([(31, 60), (41, 60), (45, 99), (27, 99)], (116, 76, 48))
    for x, y, r in ((20, 44, 18), (52, 44, 18), (36, 22, 20), (36, 48, 20)):
        pen.ellipse(x, y, r, r, colour)
    pen.ellipse(36, 38, 22, 20, colour, None)
    for x, y in ((24, 30), (46, 34), (30, 50), (52, 52), (16, 48)):
        pen.ellipse(x, y, 5, 3.5, shade(colour, 1.3), None)


def _umbrella(pen: Pen, colour: Colour) -> None:
    pen.line([(48, 4), (48, 98)], (120, 92, 66), 5)
    pen.chord(48, 48, 47, 42, 180, 360, colour)
    for half_width, paint in ((20, shade(colour, 0.75)), (8, colour)):
        pen.chord(48, 48, half_width, 42, 180, 360, paint)
    for x in (8, 29, 48, 67, 88):
        pen.ellipse(x, 48, 8 if x in (8, 88) else 9.5, 4, shade(colour, 0.85))
    pen.ellipse(48, 5, 2.5, 4, INK)


DRAW = {
    "dog": _dog,
    "cat": _cat,
    "horse": _horse,
    "car": _car,
    "bicycle": _bicycle,
    "ball": _ball,
    "tree": _tree,
    "umbrella": _umbrella,
}
