"""Training and held-out images of single objects of the demo world, with the object's kind as class."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from scripts.demo.clip.batches import training_image
from scripts.demo.scenes.vocabulary import KINDS, PLACES
from scripts.demo.scenes.world import SEEN_BY_KIND, Scene, place_entities

TRAIN_SEED, TEST_SEED = 40_000, 404
SHIPPED_SEED = 12  # images in data/demo/classes
PER_CLASS = 50  # held-out images


@dataclass(frozen=True)
class Labelled:
    """B images (B, 3, 112, 112) uint8, the class of each, and the object's box (B, 4): x0, y0, x1, y1, pixels."""

    pixels: torch.Tensor
    classes: torch.Tensor
    boxes: torch.Tensor


def single(kind: str, rng: random.Random) -> Scene:
    """A scene with one object of a kind."""
    placed = None
    while placed is None:
        placed = place_entities([rng.choice(SEEN_BY_KIND[kind])], rng)
    return Scene(rng.choice(tuple(PLACES)), placed, rng.randrange(2**31))


def training_batch(number: int, size: int) -> Labelled:
    """Batch `number` of the training stream."""
    rng = random.Random(TRAIN_SEED * 1_000_003 + number)
    return _rendered([rng.randrange(len(KINDS)) for _ in range(size)], rng)


def held_out() -> Labelled:
    """The held-out images: `PER_CLASS` of each class, from a separate seed."""
    return _rendered([index for index in range(len(KINDS)) for _ in range(PER_CLASS)], random.Random(TEST_SEED))


def _rendered(classes: list[int], rng: random.Random) -> Labelled:
    found = [training_image(single(KINDS[index], rng), rng) for index in classes]
    pixels = torch.from_numpy(np.stack([image for image, _ in found])).permute(0, 3, 1, 2).contiguous()
    return Labelled(pixels, torch.tensor(classes), torch.from_numpy(np.concatenate([boxes for _, boxes in found])))
