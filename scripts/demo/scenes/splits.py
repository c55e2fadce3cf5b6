"""The shipped validation and test scenes, generated from fixed seeds, and the default scene."""

from __future__ import annotations

import random
from dataclasses import dataclass

from scripts.demo.scenes.vocabulary import HELD_OUT, Entity
from scripts.demo.scenes.world import Placed, Scene, sample_scene

SHORT_SIDE = 320
ASPECTS = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 2.0, 1 / 2)
SEEDS = {"val": 101, "test": 202}


@dataclass(frozen=True)
class SplitPlan:
    """Number of scenes by number of entities; every `held_out_every`-th scene contains a held-out entity."""

    counts: dict[int, int]
    held_out_every: int | None


PLANS = {
    "val": SplitPlan({1: 12, 2: 28, 3: 40, 4: 40}, held_out_every=None),
    "test": SplitPlan({1: 10, 2: 20, 3: 150, 4: 150}, held_out_every=4),
}


def split_scenes(split: str) -> dict[str, Scene]:
    """Scenes by id, in the order of the split file; the test split begins with the default scene."""
    plan, rng = PLANS[split], random.Random(SEEDS[split])
    counts = [count for count, times in plan.counts.items() for _ in range(times)]
    rng.shuffle(counts)
    scenes = {DEFAULT_ID: default_scene()} if split == "test" else {}
    for index, count in enumerate(counts):
        held_out = plan.held_out_every is not None and index % plan.held_out_every == 0
        require = HELD_OUT[index // plan.held_out_every % len(HELD_OUT)] if held_out else None
        scenes[f"{split}_{index:03d}"] = sample_scene(rng, count, rng.choice(ASPECTS), held_out, require)
    return scenes


DEFAULT_ID = "test_default"


def default_scene() -> Scene:
    """A man in a red jacket among near-misses: a man in a blue jacket, a woman in a red jacket, and a dog.

    The arrangement was selected from 72, among those where the trained model points correctly: it is an illustration,
    not evidence.
    """
    placed = (
        Placed(Entity("man", "red", "jacket"), 0.165, 0.80, 0.535, flip=False),
        Placed(Entity("man", "blue", "jacket"), 0.50, 0.73, 0.50, flip=False),
        Placed(Entity("woman", "red", "jacket"), 0.83, 0.84, 0.50, flip=False),
        Placed(Entity("dog", "brown"), 0.45, 0.955, 0.165, flip=False),
    )
    return Scene("beach", placed, seed=1, aspect=3 / 2)
