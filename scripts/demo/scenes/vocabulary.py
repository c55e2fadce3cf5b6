"""Vocabulary of the demo scenes: kinds, colours, garments, and the combinations held out of training.

An entity has three attributes: `kind` ("man", "dog", "car"), `colour`, and for people the `garment` of that colour.
"""

from __future__ import annotations

from dataclasses import dataclass

PEOPLE = ("man", "woman", "boy", "girl")
ANIMALS = ("dog", "cat", "horse")
THINGS = ("car", "bicycle", "ball", "tree", "umbrella")
KINDS = PEOPLE + ANIMALS + THINGS
GARMENTS = ("jacket", "shirt", "dress", "hat")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "pink", "brown", "grey")
PLACES = {"street": "on the street", "grass": "on the grass", "beach": "on the beach", "snow": "in the snow"}

# Possible colours of each kind; for people, the colours of their garment.
CLOTHES_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange", "pink")
PAINT_COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "pink")
KIND_COLOURS = {
    **dict.fromkeys(PEOPLE, CLOTHES_COLOURS),
    "dog": ("brown", "black", "white", "grey"),
    "cat": ("black", "white", "orange", "grey"),
    "horse": ("brown", "black", "white", "grey"),
    "car": ("red", "blue", "green", "yellow", "black", "white", "grey"),
    "bicycle": PAINT_COLOURS,
    "ball": PAINT_COLOURS,
    "tree": ("green", "yellow", "orange"),
    "umbrella": PAINT_COLOURS,
}
KIND_GARMENTS = {
    "man": ("jacket", "shirt", "hat"),
    "boy": ("jacket", "shirt", "hat"),
    "woman": GARMENTS,
    "girl": GARMENTS,
}

# The type names of the Flickr30k Entities layout.
ENTITY_TYPES = {
    **dict.fromkeys(PEOPLE, "people"),
    **dict.fromkeys(ANIMALS, "animals"),
    **dict.fromkeys(THINGS, "other"),
    "car": "vehicles",
    "bicycle": "vehicles",
}


@dataclass(frozen=True)
class Entity:
    """One object in a scene, given by its attributes; `garment` is None unless it is a person."""

    kind: str
    colour: str
    garment: str | None = None


# Never rendered, named or used as a negative in training. Some test scenes contain them, so that they are scored
# separately. Each single attribute, and each pair of attributes of a combination with three, occurs in training.
HELD_OUT = (
    Entity("man", "purple", "jacket"),
    Entity("woman", "green", "dress"),
    Entity("boy", "yellow", "shirt"),
    Entity("girl", "orange", "jacket"),
    Entity("woman", "blue", "hat"),
    Entity("car", "yellow"),
    Entity("ball", "purple"),
    Entity("umbrella", "pink"),
)

ALL_ENTITIES = tuple(
    Entity(kind, colour, garment)
    for kind in KINDS
    for garment in KIND_GARMENTS.get(kind, (None,))
    for colour in KIND_COLOURS[kind]
)
SEEN_ENTITIES = tuple(entity for entity in ALL_ENTITIES if entity not in HELD_OUT)


def swaps(entity: Entity) -> tuple[Entity, ...]:
    """Every possible entity that differs from `entity` in exactly one attribute, held-out ones included."""
    family = next(group for group in (PEOPLE, ANIMALS, THINGS) if entity.kind in group)

    def distance(other: Entity) -> int:
        return (other.kind != entity.kind) + (other.colour != entity.colour) + (other.garment != entity.garment)

    return tuple(other for other in ALL_ENTITIES if other.kind in family and distance(other) == 1)


SWAPS = {entity: swaps(entity) for entity in ALL_ENTITIES}
SEEN_SWAPS = {entity: tuple(s for s in SWAPS[entity] if s not in HELD_OUT) for entity in ALL_ENTITIES}
