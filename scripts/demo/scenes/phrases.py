"""Generate phrases for entities and captions of several phrases, in lower case.

A caption is a list of segments `(text, entity index or None)`, so that it can be printed as plain text or with the
phrase marks of the Flickr30k Entities layout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.demo.scenes.vocabulary import COLOURS, GARMENTS, KINDS, PLACES, Entity

Segment = tuple[str, int | None]
STYLES = ("a", "bare", "the")

PAIR_WORDS = (" and ", " next to ", " beside ", " with ", " near ", " is next to ")
OPENINGS = ("", "", "", "there is ", "a picture of ", "a photo of ", "image of ")
VOCABULARY = tuple(
    dict.fromkeys(
        [
            *(*KINDS, *GARMENTS, *COLOURS),
            *" ".join([*PLACES.values(), *PAIR_WORDS, *OPENINGS]).split(),
            *("a", "an", "the", "in", "wearing", ".", ","),
        ]
    )
)


@dataclass(frozen=True)
class Query:
    """The attributes named by a phrase; None matches any value. A full query has all attributes of one entity."""

    kind: str | None = None
    colour: str | None = None
    garment: str | None = None

    def matches(self, entity: Entity) -> bool:
        """Whether the entity has every attribute of the query."""
        return (
            self.kind in (None, entity.kind)
            and self.colour in (None, entity.colour)
            and self.garment in (None, entity.garment)
        )


def full_query(entity: Entity) -> Query:
    """The query with all attributes of the entity."""
    return Query(entity.kind, entity.colour, entity.garment)


def _with_article(words: str, style: str) -> str:
    if style == "bare":
        return words
    if style == "the":
        return "the " + words
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(query: Query | Entity, style: str = "bare", verb: str = "in") -> str:
    """ "man in red jacket" (bare), "a man in a red jacket" (a), "the man in the red jacket" (the)."""
    if query.garment is None:
        words = " ".join(word for word in (query.colour, query.kind) if word)
        return _with_article(words, style)
    clothes = _with_article(f"{query.colour} {query.garment}", style)
    if query.kind is None:
        return clothes
    return f"{_with_article(query.kind, style)} {verb} {clothes}"


def random_phrase(query: Query | Entity, rng: random.Random) -> str:
    """The phrase in a random form; half of them are bare, as people type them."""
    style = rng.choices(STYLES, (3, 5, 2))[0]
    return phrase(query, style, "wearing" if rng.random() < 0.12 else "in")


@dataclass(frozen=True)
class CaptionPlan:
    """A caption without its entities, so that a caption with a swapped entity differs in one phrase only."""

    order: tuple[int, ...]  # indices of the named entities
    style: str
    verb: str
    opening: str
    joint: str
    place: str | None
    stop: str

    def segments(self, entities: Sequence[Entity]) -> list[Segment]:
        """The caption for the entities of a scene."""
        parts: list[Segment] = [(self.opening, None)] if self.opening else []
        for position, index in enumerate(self.order):
            if position:
                last = position == len(self.order) - 1
                first = position == 1
                joint = self.joint if first and (last or self.joint != " and ") else " and " if last else ", "
                parts.append((joint, None))
            parts.append((phrase(entities[index], self.style, self.verb), index))
        if self.place:
            parts.append((" " + PLACES[self.place], None))
        if self.stop:
            parts.append((self.stop, None))
        return parts


def plan_caption(order: Sequence[int], place: str, rng: random.Random) -> CaptionPlan:
    """A random plan that names the entities in `order`."""
    style = rng.choices(STYLES, (6, 3, 1))[0]
    opening = rng.choice(OPENINGS)
    joints = PAIR_WORDS if not opening else PAIR_WORDS[:-1]
    return CaptionPlan(
        order=tuple(order),
        style=style,
        verb="wearing" if rng.random() < 0.12 else "in",
        opening=opening,
        joint=rng.choice(joints) if len(order) > 1 else " and ",
        place=place if rng.random() < 0.6 else None,
        stop=rng.choice(("", " .")) if style != "bare" else "",
    )


def join(segments: Sequence[Segment]) -> str:
    """The caption as plain text."""
    return "".join(text for text, _ in segments)
