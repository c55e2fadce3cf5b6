"""Image-text pairs to train the multimodal encoder: matching, not matching (easy to hard) and masked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scripts.demo.clip.batches import MAX_ENTITIES, false_swap
from scripts.demo.flava.batches import loose_query, masked, phrase_words
from scripts.demo.flava.text import PAD, Words, padded, words_of
from scripts.demo.scenes.phrases import Query, full_query, plan_caption
from scripts.demo.scenes.vocabulary import Entity
from scripts.demo.scenes.world import Scene

IGNORED = -100


@dataclass
class Rows:
    """Pairs of a batch; R rows, T tokens."""

    image: torch.Tensor  # (R,) index of the image
    ids: torch.Tensor  # (R, T)
    match: torch.Tensor  # (R,) 1 true, 0 false, -100 where a word is masked
    labels: torch.Tensor  # (R, T) the masked words, -100 elsewhere
    in_phrase: torch.Tensor  # (R, T) bool: the token is part of a phrase of a pair for matching
    entities: torch.Tensor  # (R, T, 4) bool: the entities of the scene that match the token's phrase


@dataclass(frozen=True)
class Row:
    """One pair; `queries` are indexed by the owners in `words`."""

    image: int
    words: Words
    queries: Sequence[Query]
    match: int
    hidden: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # masked ids and labels


def make_rows(scenes: Sequence[Scene], hard: float, rng: random.Random) -> Rows:
    """Four rows per image; a share `hard` of the false texts are one-attribute swaps, the others fit another image."""
    rows = []
    for index, scene in enumerate(scenes):
        other = scenes[rng.randrange(len(scenes))]
        rows.append(_true_phrase(index, scene, rng))
        rows.append(_false_phrase(index, scene, other, rng.random() < hard, rng))
        true = rng.random() < 0.5
        rows.append(_caption(index, scene, rng) if true else _false_caption(index, scene, other, hard, rng))
        text = _full_phrase if rng.random() < 0.5 else _caption
        rows.append(_masked(text(index, scene, rng), rng))
    return _tensors(rows, scenes)


def _full_phrase(index: int, scene: Scene, rng: random.Random) -> Row:
    entity = rng.choice(scene.entities)
    return Row(index, phrase_words(entity, 0, rng), [full_query(entity)], 1)


def _true_phrase(index: int, scene: Scene, rng: random.Random) -> Row:
    if rng.random() < 0.8:
        return _full_phrase(index, scene, rng)
    query = loose_query(rng.choice(scene.entities), rng)
    return Row(index, phrase_words(query, 0, rng), [query], 1)


def _false_phrase(index: int, scene: Scene, other: Scene, hard: bool, rng: random.Random) -> Row:
    absent = [entity for entity in other.entities if entity not in scene.entities]
    wrong = rng.choice(absent) if absent and not hard else false_swap(rng.choice(scene.entities), scene, rng)
    return Row(index, phrase_words(wrong, 0, rng), [full_query(wrong)], 0)


def _caption_of(index: int, entities: Sequence[Entity], place: str, match: int, rng: random.Random) -> Row:
    order = rng.sample(range(len(entities)), len(entities))
    words = words_of(plan_caption(order, place, rng).segments(entities))
    return Row(index, words, [full_query(entity) for entity in entities], match)


def _some(entities: Sequence[Entity], rng: random.Random) -> list[Entity]:
    """All entities in random order, or in three of ten cases a random number of them."""
    count = len(entities) if rng.random() < 0.7 else rng.randint(1, len(entities))
    return rng.sample(list(entities), count)


def _caption(index: int, scene: Scene, rng: random.Random) -> Row:
    return _caption_of(index, _some(scene.entities, rng), scene.place, 1, rng)


def _false_caption(index: int, scene: Scene, other: Scene, hard: float, rng: random.Random) -> Row:
    if rng.random() >= hard and not set(other.entities) <= set(scene.entities):
        return _caption_of(index, other.entities, other.place, 0, rng)
    entities = _some(scene.entities, rng)
    victim = rng.randrange(len(entities))
    entities[victim] = false_swap(entities[victim], scene, rng)
    return _caption_of(index, entities, scene.place, 0, rng)


def _masked(row: Row, rng: random.Random) -> Row:
    return Row(row.image, row.words, row.queries, IGNORED, masked(row.words, 0.25, rng))


def _tensors(rows: Sequence[Row], scenes: Sequence[Scene]) -> Rows:
    owner = padded([row.words.owner for row in rows], -1)
    ids = padded([row.hidden[0] if row.hidden else row.words.ids for row in rows], PAD)
    labels = padded([row.hidden[1] if row.hidden else (IGNORED,) for row in rows], IGNORED)
    table = torch.full((len(rows), owner.shape[1]), IGNORED)
    table[:, : labels.shape[1]] = labels
    named = torch.zeros(len(rows), MAX_ENTITIES, MAX_ENTITIES, dtype=torch.bool)  # (R, owner, entity)
    for index, row in enumerate(rows):
        for position, query in enumerate(row.queries):
            for column, entity in enumerate(scenes[row.image].entities):
                named[index, position, column] = query.matches(entity)
    matching = named.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, MAX_ENTITIES))
    match = torch.tensor([row.match for row in rows])
    return Rows(
        image=torch.tensor([row.image for row in rows]),
        ids=ids,
        match=match,
        labels=table,
        in_phrase=(owner >= 0) & (match >= 0)[:, None],
        entities=matching & (owner >= 0)[..., None],
    )
