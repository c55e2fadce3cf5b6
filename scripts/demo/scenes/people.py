"""Draw the four kinds of people, which differ in hair, beard, face, height and build, with one named garment.

Design frame as in `pen.py`: 100 units high. Adults have a smaller head and longer legs than children.
"""

from __future__ import annotations

import random

from scripts.demo.scenes.pen import INK, Colour, Pen, shade

PERSON_WIDTH = 60.0
SKINS: tuple[Colour, ...] = ((250, 215, 186), (236, 190, 150), (198, 140, 98), (141, 92, 62))
# Hair never has a colour of clothes; otherwise "red" could refer to a head.
HAIRS: tuple[Colour, ...] = ((46, 34, 30), (92, 58, 34), (132, 88, 50))
FAIR_HAIRS: tuple[Colour, ...] = ((92, 58, 34), (150, 104, 58), (196, 152, 88))
PLAIN_TOP: Colour = (176, 166, 156)
PLAIN_TROUSERS: tuple[Colour, ...] = ((84, 86, 102), (110, 100, 92), (72, 78, 84))
SHOES: Colour = (66, 50, 44)
MIDDLE = PERSON_WIDTH / 2


def draw_person(pen: Pen, kind: str, garment: str, colour: Colour, rng: random.Random) -> None:
    """Draw a man, woman, boy or girl whose `garment` has `colour`; all other clothes are plain."""
    adult = kind in ("man", "woman")
    skin = rng.choice(SKINS)
    hair = _pick_hair(kind, skin, rng)
    trousers = rng.choice(PLAIN_TROUSERS)
    head = (MIDDLE, 20.0, 13.5) if adult else (MIDDLE, 25.0, 18.0)
    _hair_behind(pen, kind, head, hair)
    _legs(pen, kind, garment, skin, trousers)
    _body(pen, kind, garment, colour, skin)
    _head(pen, kind, head, skin, hair)
    if garment == "hat":
        _hat(pen, head, colour)


def _pick_hair(kind: str, skin: Colour, rng: random.Random) -> Colour:
    """A hair colour that stands out from the skin, or a dark beard would vanish."""
    hairs = HAIRS if kind in ("man", "boy") else FAIR_HAIRS
    return rng.choice([hair for hair in hairs if sum(skin) - sum(hair) > 150] or [HAIRS[0]])


def _hair_behind(pen: Pen, kind: str, head: tuple[float, float, float], hair: Colour) -> None:
    """Hair behind head and shoulders: long for a woman, bunches for a girl."""
    x, y, r = head
    if kind == "woman":
        pen.ellipse(x, y - 1, r + 3.5, r + 2, hair)
        pen.polygon([(x - r - 3.5, y), (x + r + 3.5, y), (x + r + 5.5, y + 26), (x - r - 5.5, y + 26)], hair)
    elif kind == "girl":
        for side in (-1, 1):
            pen.ellipse(x + side * (r + 4.5), y + 6, 6.5, 10, hair)


def _legs(pen: Pen, kind: str, garment: str, skin: Colour, trousers: Colour) -> None:
    top, spread = (60, 6.2) if kind in ("man", "woman") else (70, 6.6)
    bare = kind in ("woman", "girl")
    for side in (-1, 1):
        x = MIDDLE + side * spread
        pen.limb([(x, top), (x, 94)], skin if bare else trousers, 5.5 if bare else 9.5)
        if kind == "boy":
            pen.limb([(x, 86), (x, 94)], skin, 6)
        pen.chord(x + side * 1.5, 98.5, 6, 5, 180, 360, SHOES)
    if bare and garment != "dress":
        hem, waist = (77, 58) if kind == "woman" else (84, 68)
        pen.polygon([(MIDDLE - 9, waist), (MIDDLE + 9, waist), (MIDDLE + 15, hem), (MIDDLE - 15, hem)], trousers)


def _body(pen: Pen, kind: str, garment: str, colour: Colour, skin: Colour) -> None:
    """Arms and torso; a jacket has long sleeves and an open front, a shirt short sleeves, a dress a wide skirt."""
    adult = kind in ("man", "woman")
    top, hip = (32, 63) if adult else (43, 74)
    shoulder = {"man": 16.0, "woman": 11.5, "boy": 12.5, "girl": 11.0}[kind]
    waist = {"man": 13.0, "woman": 10.0, "boy": 12.0, "girl": 10.5}[kind]
    cloth = PLAIN_TOP if garment == "hat" else colour
    for side in (-1, 1):
        start, elbow, hand = (
            (MIDDLE + side * (shoulder - 1.5), top + 4.5),
            (MIDDLE + side * (shoulder + 4.5), top + 15),
            (MIDDLE + side * (shoulder + 6.0), hip - 4),
        )
        pen.limb([start, elbow, hand], cloth if garment == "jacket" else skin, 7.5 if garment == "jacket" else 5.5)
        if garment == "jacket":
            pen.ellipse(*hand, 3.4, 3.4, skin)
        elif garment in ("shirt", "hat"):
            pen.limb([start, ((start[0] + elbow[0]) / 2, (start[1] + elbow[1]) / 2 + 1)], cloth, 8.5)
    if garment == "dress":
        hem = 84 if adult else 90
        pen.polygon(
            [
                (MIDDLE - shoulder + 1, top),
                (MIDDLE + shoulder - 1, top),
                (MIDDLE + waist - 1, top + 17),
                (MIDDLE + 22, hem),
                (MIDDLE - 22, hem),
                (MIDDLE - waist + 1, top + 17),
            ],
            cloth,
        )
        pen.line([(MIDDLE - waist + 1, top + 17), (MIDDLE + waist - 1, top + 17)], shade(cloth, 0.6), 2.5)
        return
    pen.polygon(
        [(MIDDLE - shoulder, top), (MIDDLE + shoulder, top), (MIDDLE + waist, hip), (MIDDLE - waist, hip)], cloth
    )
    if garment == "jacket":
        _jacket_front(pen, cloth, top, hip)
    else:
        pen.chord(MIDDLE, top, 6, 5, 0, 180, skin)


def _jacket_front(pen: Pen, cloth: Colour, top: float, hip: float) -> None:
    """The open front of a jacket over a plain shirt, with lapels and a hem band."""
    inner = (226, 222, 214) if sum(cloth) < 600 else (120, 116, 112)
    pen.polygon([(MIDDLE - 5.5, top), (MIDDLE + 5.5, top), (MIDDLE + 3.2, hip), (MIDDLE - 3.2, hip)], inner)
    for side in (-1, 1):
        pen.polygon(
            [(MIDDLE + side * 5, top - 1), (MIDDLE + side * 10, top + 3), (MIDDLE + side * 4, top + 12)],
            shade(cloth, 0.72),
        )


def _head(pen: Pen, kind: str, head: tuple[float, float, float], skin: Colour, hair: Colour) -> None:
    x, y, r = head
    pen.ellipse(x, y, r, r, skin)
    if kind == "man":
        _beard(pen, head, hair)
    _hair_front(pen, kind, head, hair)
    eye = r * 0.13
    for side in (-1, 1):
        pen.ellipse(x + side * r * 0.38, y + r * 0.12, eye, eye * 1.25, INK, outline=None)
        if kind in ("girl", "boy"):
            pen.ellipse(x + side * r * 0.6, y + r * 0.45, r * 0.16, r * 0.12, (240, 150, 140), outline=None)
    if kind == "woman":
        pen.ellipse(x, y + r * 0.58, r * 0.26, r * 0.15, (200, 48, 66), outline=None)
    elif kind != "man":
        pen.chord(x, y + r * 0.45, r * 0.3, r * 0.26, 0, 180, (150, 60, 56), outline=None)


def _beard(pen: Pen, head: tuple[float, float, float], hair: Colour) -> None:
    """A full beard with a mouth: it identifies a man even at low resolution."""
    x, y, r = head
    pen.chord(x, y + 1.2, r + 0.4, r + 1.6, 17, 163, hair)
    pen.ellipse(x, y + r * 0.58, r * 0.28, r * 0.11, (214, 120, 110), outline=None)


def _hair_front(pen: Pen, kind: str, head: tuple[float, float, float], hair: Colour) -> None:
    x, y, r = head
    if kind == "man":
        pen.chord(x, y - 1, r + 0.8, r + 1, 195, 345, hair)
    elif kind == "woman":
        pen.chord(x, y - 0.5, r + 1.5, r + 1.5, 205, 335, hair)
        pen.polygon([(x - r - 2, y - 4), (x - r + 5, y - 7), (x - r + 1, y + 8), (x - r - 3, y + 14)], hair, None)
        pen.polygon([(x + r + 2, y - 4), (x + r - 5, y - 7), (x + r - 1, y + 8), (x + r + 3, y + 14)], hair, None)
    elif kind == "boy":
        tips = [
            (x + r * dx, y - r * dy)
            for dx, dy in (
                (-1.04, 0.1),
                (-1.15, 0.62),
                (-0.72, 0.82),
                (-0.5, 1.28),
                (-0.12, 1.02),
                (0.2, 1.36),
                (0.46, 0.98),
                (0.88, 1.12),
                (0.92, 0.7),
                (1.18, 0.44),
                (1.02, 0.1),
                (0.6, 0.48),
                (0.2, 0.36),
                (-0.2, 0.52),
                (-0.6, 0.4),
            )
        ]
        pen.polygon(tips, hair)
    else:
        pen.chord(x, y - 0.5, r + 1.2, r + 1.2, 200, 340, hair)
        for side in (-1, 1):
            pen.ellipse(x + side * (r + 1.5), y - 3, 3.2, 3.2, (248, 244, 236))


def _hat(pen: Pen, head: tuple[float, float, float], colour: Colour) -> None:
    """A hat with a wide brim and a dark band, over the hair."""
    x, y, r = head
    brim = y - r * 0.42
    pen.polygon(
        [(x - r * 0.95, brim), (x - r * 0.8, brim - r * 0.95), (x + r * 0.8, brim - r * 0.95), (x + r * 0.95, brim)],
        colour,
    )
    pen.line([(x - r * 0.9, brim - r * 0.22), (x + r * 0.9, brim - r * 0.22)], shade(colour, 0.55), r * 0.22)
    pen.ellipse(x, brim, r * 1.6, r * 0.27, colour)
