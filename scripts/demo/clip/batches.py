"""Training batches of the demo CLIP: rendered scenes, captions and queries, determined by batch number and seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from scripts.demo.clip.tokenizer import IMAGE_SIZE
from scripts.demo.scenes.phrases import Query, full_query, join, plan_caption, random_phrase
from scripts.demo.scenes.vocabulary import COLOURS, GARMENTS, KINDS, SEEN_ENTITIES, SEEN_SWAPS, Entity
from scripts.demo.scenes.world import Scene, render, sample_scene

TRAIN_SEED = 20_000
COUNT_WEIGHTS = (2, 3, 5, 6)  # scenes with 1, 2, 3, 4 entities
MAX_ENTITIES = 4
RENDER_SIZES = (112, 112, 128, 160)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass
class Batch:
    """One training batch; B images, P distinct queries."""

    pixels: torch.Tensor  # (B, 3, 112, 112) uint8
    boxes: torch.Tensor  # (B, 4, 4) input pixels, (x0, y0, x1, y1), half-open; zeros where there is no entity
    entity_query: torch.Tensor  # (B, 4) index of the entity's full query in `queries`, -1 where there is none
    captions: torch.Tensor  # (2 B, T) token ids: the true captions, then one swapped caption for each
    queries: torch.Tensor  # (P, T) token ids
    full: torch.Tensor  # (P,) bool: the query names all attributes of an entity
    present: torch.Tensor  # (B, P) bool: the query matches something in the image
    hard: torch.Tensor  # (B, P) bool: the query is a one-attribute swap for this image

    def normalised(self) -> torch.Tensor:
        """(B, 3, 112, 112) float32 with CLIP's mean and standard deviation."""
        return (self.pixels.float() / 255 - MEAN) / STD


def training_image(scene: Scene, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Image (112, 112, 3) and boxes in its pixels.

    Some images are rendered larger and resized with the filter of the image processor, like the shipped scenes.
    """
    size = rng.choice(RENDER_SIZES)
    image, boxes = render(scene, size)
    if size != IMAGE_SIZE:
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image), boxes * (IMAGE_SIZE / size)


def false_swap(entity: Entity, scene: Scene, rng: random.Random) -> Entity:
    """A one-attribute swap of `entity` that is absent from the scene; any absent entity if all swaps are present."""
    absent = [swap for swap in SEEN_SWAPS[entity] if swap not in scene.entities]
    return rng.choice(absent or [other for other in SEEN_ENTITIES if other not in scene.entities])


class _QueryTable:
    """The distinct queries of a batch with one text each."""

    def __init__(self) -> None:
        self.index: dict[Query, int] = {}
        self.texts: list[str] = []

    def add(self, query: Query, rng: random.Random) -> int:
        if query not in self.index:
            self.index[query] = len(self.texts)
            self.texts.append(random_phrase(query, rng))
        return self.index[query]


def _loose_queries(entity: Entity, rng: random.Random) -> Iterator[Query]:
    """Queries with some of the attributes: "man", "red jacket"."""
    if rng.random() < 0.15:
        yield Query(kind=entity.kind)
    if entity.garment and rng.random() < 0.15:
        yield Query(colour=entity.colour, garment=entity.garment)


def make_batch(number: int, size: int, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Batch `number` of the training stream."""
    rng = random.Random(TRAIN_SEED * 1_000_003 + number)
    table = _QueryTable()
    scenes, images, captions, swapped = [], [], [], []
    boxes = np.zeros((size, MAX_ENTITIES, 4), dtype=np.float32)
    entity_query = np.full((size, MAX_ENTITIES), -1, dtype=np.int64)
    hard_pairs: list[tuple[int, int]] = []
    for row in range(size):
        scene = sample_scene(rng, rng.choices(range(1, MAX_ENTITIES + 1), COUNT_WEIGHTS)[0])
        image, drawn = training_image(scene, rng)
        scenes.append(scene)
        images.append(image)
        boxes[row, : len(drawn)] = drawn
        for column, entity in enumerate(scene.entities):
            entity_query[row, column] = table.add(full_query(entity), rng)
            hard_pairs.append((row, table.add(full_query(false_swap(entity, scene, rng)), rng)))
            for query in _loose_queries(entity, rng):
                table.add(query, rng)
        true_caption, false_caption = _captions(scene, rng)
        captions.append(true_caption)
        swapped.append(false_caption)
    queries = list(table.index)
    hard = torch.zeros(size, len(queries), dtype=torch.bool)
    hard[tuple(torch.tensor(hard_pairs).T)] = True
    return Batch(
        pixels=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        boxes=torch.from_numpy(boxes),
        entity_query=torch.from_numpy(entity_query),
        captions=_ids(captions + swapped, tokenizer),
        queries=_ids(table.texts, tokenizer),
        full=torch.tensor([query.kind is not None and query.colour is not None for query in queries]),
        present=_present(scenes, queries),
        hard=hard,
    )


def _captions(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A caption of all or some of the entities, and the same caption with one attribute of one entity swapped."""
    order = rng.sample(range(len(scene.entities)), len(scene.entities))
    if rng.random() < 0.3:
        order = order[: rng.randint(1, len(order))]
    plan = plan_caption(order, scene.place, rng)
    wrong = list(scene.entities)
    victim = rng.choice(order)
    wrong[victim] = false_swap(wrong[victim], scene, rng)
    return join(plan.segments(scene.entities)), join(plan.segments(wrong))


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    return tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]


def _codes(items: Sequence[Query | Entity]) -> np.ndarray:
    """(n, 3) attribute codes; None is -1."""

    def code(value: str | None, names: tuple[str, ...]) -> int:
        return -1 if value is None else names.index(value)

    return np.array([[code(i.kind, KINDS), code(i.colour, COLOURS), code(i.garment, GARMENTS)] for i in items])


def _present(scenes: list[Scene], queries: list[Query]) -> torch.Tensor:
    wanted = _codes(queries)  # (P, 3)
    rows = []
    for scene in scenes:
        found = _codes(scene.entities)[:, None]  # (N, 1, 3)
        rows.append(((wanted == -1) | (wanted == found)).all(-1).any(0))
    return torch.from_numpy(np.stack(rows))
