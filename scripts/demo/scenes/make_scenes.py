"""Render the validation and test scenes into data/demo/scenes, in the layout of Flickr30k Entities.

    python -m scripts.demo.scenes.make_scenes

The seeds are in `splits.py`; the same versions of Pillow and numpy write the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from scripts.demo.paths import DATA
from scripts.demo.scenes.phrases import STYLES, CaptionPlan, Segment, join, phrase, plan_caption
from scripts.demo.scenes.splits import DEFAULT_ID, SHORT_SIDE, default_scene, split_scenes
from scripts.demo.scenes.vocabulary import (
    ANIMALS,
    COLOURS,
    ENTITY_TYPES,
    GARMENTS,
    HELD_OUT,
    PEOPLE,
    SEEN_ENTITIES,
    THINGS,
)
from scripts.demo.scenes.world import Scene, render

CAPTIONS_PER_SCENE = 5
JPEG = {"quality": 80, "optimize": True, "progressive": True}


def scene_captions(name: str, scene: Scene) -> list[list[Segment]]:
    """Five different captions; the first names every entity, the others name all or some of them."""
    rng = random.Random(f"captions of {name}")
    captions: list[list[Segment]] = []
    while len(captions) < CAPTIONS_PER_SCENE:
        order = rng.sample(range(len(scene.entities)), len(scene.entities))
        if captions and rng.random() < 0.4:
            order = order[: rng.randint(1, len(order))]
        plan: CaptionPlan = plan_caption(order, scene.place, rng)
        caption = plan.segments(scene.entities)
        if join(caption) not in [join(other) for other in captions]:
            captions.append(caption)
    return captions


def marked(caption: Sequence[Segment], scene: Scene, first_chain: int) -> str:
    """The caption with its phrases marked: `[/EN#<chain>/<type> <phrase>]`."""
    return "".join(
        text if index is None else f"[/EN#{first_chain + index}/{ENTITY_TYPES[scene.entities[index].kind]} {text}]"
        for text, index in caption
    )


def annotation(file_name: str, size: tuple[int, int], boxes: np.ndarray, first_chain: int) -> str:
    """The XML of one image of `size` (width, height).

    `boxes` are half-open and 0-based, (x0, y0, x1, y1) in image pixels; the file's are 1-based and inclusive.
    """
    lines = ["<annotation>", f"  <filename>{escape(file_name)}</filename>"]
    lines.append(f"  <size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>")
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        lines += [
            "  <object>",
            f"    <name>{first_chain + index}</name>",
            f"    <bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def held_out_phrases() -> list[str]:
    """Every phrase that names a held-out combination."""
    forms = [phrase(entity, style, verb) for entity in HELD_OUT for style in STYLES for verb in ("in", "wearing")]
    return list(dict.fromkeys(forms))


def swaps() -> dict[str, list[Any]]:
    """Groups of words that can replace each other in wrong captions, and the combinations used in training."""
    groups = (COLOURS, GARMENTS, PEOPLE, ANIMALS, THINGS)
    seen = [" ".join(filter(None, (entity.kind, entity.colour, entity.garment))) for entity in SEEN_ENTITIES]
    return {"groups": [list(group) for group in groups], "combinations": seen}


def write_split(folder: Path, split: str, first_chain: int) -> tuple[list[tuple[str, str]], int]:
    """Write the images, sentences and boxes of a split; return its rows of captions.txt and the next free chain id."""
    rows: list[tuple[str, str]] = []
    scenes = split_scenes(split)
    for name, scene in scenes.items():
        image, boxes = render(scene, SHORT_SIDE)
        file_name = f"{name}.jpg"
        image.save(folder / "Images" / file_name, **JPEG)
        captions = scene_captions(name, scene)
        rows += [(file_name, join(caption)) for caption in captions]
        sentences = "\n".join(marked(caption, scene, first_chain) for caption in captions)
        (folder / "Sentences" / f"{name}.txt").write_text(sentences + "\n", encoding="utf-8")
        xml = annotation(file_name, image.size, boxes, first_chain)
        (folder / "Annotations" / f"{name}.xml").write_text(xml, encoding="utf-8")
        first_chain += len(scene.entities)
    (folder / f"{split}.txt").write_text("\n".join(scenes) + "\n", encoding="utf-8")
    return rows, first_chain


def write_scenes(folder: Path) -> int:
    """Write all splits to `folder`, which is replaced as a whole; return the number of images."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    for part in ("Images", "Sentences", "Annotations"):
        (fresh / part).mkdir(parents=True)
    rows: list[tuple[str, str]] = []
    chain = 1
    for split in ("val", "test"):
        more, chain = write_split(fresh, split, chain)
        rows += more
    with (fresh / "captions.txt").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "caption"), *rows])
    (fresh / "swaps.json").write_text(json.dumps(swaps(), indent=1) + "\n", encoding="utf-8")
    (fresh / "heldout.txt").write_text("\n".join(held_out_phrases()) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)
    return len(rows) // CAPTIONS_PER_SCENE


def write_default(folder: Path) -> None:
    """Write the default image in high quality, and the path of its scene."""
    image, _ = render(default_scene(), SHORT_SIDE)
    image.save(folder / "default.jpg", quality=94, subsampling=0, optimize=True)
    (folder / "default.txt").write_text(f"scenes/Images/{DEFAULT_ID}.jpg\n", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "scenes", help="folder to write; default.jpg goes beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the scenes and the default image."""
    arguments = build_parser().parse_args(argv)
    count = write_scenes(arguments.out)
    write_default(arguments.out.parent)
    print(f"{count} images in {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
