"""Training data of the demo FLAVA: texts without images, and rendered scenes.

Batch number and seed determine the content, which never includes held-out combinations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from scripts.demo.clip.batches import COUNT_WEIGHTS, MAX_ENTITIES, MEAN, STD, training_image
from scripts.demo.flava.text import CONTENT_IDS, MASK, Words, words_of
from scripts.demo.scenes.phrases import Query, plan_caption, random_phrase
from scripts.demo.scenes.vocabulary import PLACES, SEEN_SWAPS, Entity
from scripts.demo.scenes.world import Scene, sample_entities, sample_scene

TRAIN_SEED = 40_000


@dataclass
class ImageBatch:
    """Rendered training scenes; B images."""

    pixels: torch.Tensor  # (B, 3, 112, 112) uint8
    boxes: torch.Tensor  # (B, 4, 4) input pixels, (x0, y0, x1, y1), half-open; zeros where there is no entity
    scenes: list[Scene]

    def normalised(self) -> torch.Tensor:
        """(B, 3, 112, 112) float32 with CLIP's mean and standard deviation, which are FLAVA's."""
        return (self.pixels.float() / 255 - MEAN) / STD


def make_images(number: int, size: int) -> ImageBatch:
    """Batch `number` of the training stream."""
    rng = random.Random(TRAIN_SEED * 1_000_003 + number)
    scenes, images = [], []
    boxes = np.zeros((size, MAX_ENTITIES, 4), dtype=np.float32)
    for row in range(size):
        scene = sample_scene(rng, rng.choices(range(1, MAX_ENTITIES + 1), COUNT_WEIGHTS)[0])
        image, drawn = training_image(scene, rng)
        boxes[row, : len(drawn)] = drawn
        scenes.append(scene)
        images.append(image)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return ImageBatch(pixels, torch.from_numpy(boxes), scenes)


def phrase_words(query: Query | Entity, owner: int, rng: random.Random) -> Words:
    """One phrase in a random form; all its words refer to the entity `owner`."""
    return words_of([(random_phrase(query, rng), owner)])


def loose_query(entity: Entity, rng: random.Random) -> Query:
    """A query with some of the entity's attributes."""
    if entity.garment is None:
        return rng.choice((Query(entity.kind), Query(colour=entity.colour)))
    return rng.choice(
        (Query(entity.kind), Query(None, entity.colour, entity.garment), Query(entity.kind, entity.colour))
    )


def text_without_image(rng: random.Random) -> tuple[Words, list[Entity]]:
    """A caption or phrase of random entities, and the entities that `Words.owner` refers to."""
    entities = sample_entities(rng.choices(range(1, MAX_ENTITIES + 1), COUNT_WEIGHTS)[0], rng)
    if rng.random() < 0.5:
        entity = entities[0]
        if rng.random() < 0.5:
            entity = rng.choice(SEEN_SWAPS[entity] or (entity,))
        return phrase_words(entity, 0, rng), [entity]
    order = rng.sample(range(len(entities)), len(entities))
    plan = plan_caption(order, rng.choice(tuple(PLACES)), rng)
    return words_of(plan.segments(entities)), entities


def masked(words: Words, share: float, rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids with about `share` of the content words (at least one) and a few others masked, and labels (-100: none)."""
    content = [position for position, word in enumerate(words.ids) if word in CONTENT_IDS]
    others = [position for position in range(1, len(words.ids) - 1) if position not in content]
    hidden = {position for position in content if rng.random() < share} or {rng.choice(content)}
    hidden |= {position for position in others if rng.random() < 0.05}
    ids = tuple(MASK if position in hidden else word for position, word in enumerate(words.ids))
    labels = tuple(word if position in hidden else -100 for position, word in enumerate(words.ids))
    return ids, labels
