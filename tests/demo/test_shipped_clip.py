"""The shipped model on the shipped scenes: maps that mean something, measured against exact boxes."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from adapters import load
from grounding import Selection, explain
from grounding.core.demo import demo_folder, demo_image

SCENES = demo_folder() / "scenes"
PHRASE = re.compile(r"\[/EN#(\d+)(?:/\w+)+ ([^\]]*)\]")
# Phrases of at most this many scenes are scored here; the whole test split is a matter of minutes.
SCENES_SCORED = 60


def annotations(name):
    """Chain id -> box (x0, y0, x1, y1), half-open, origin 0; and (chain id, phrase) of the first caption."""
    boxes = {}
    for thing in ET.parse(SCENES / "Annotations" / f"{name}.xml").iter("object"):
        x0, y0, x1, y1 = (int(thing.find("bndbox").findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
        boxes[thing.findtext("name")] = (x0 - 1, y0 - 1, x1, y1)
    caption = (SCENES / "Sentences" / f"{name}.txt").read_text().splitlines()[0]
    return boxes, PHRASE.findall(caption)


def inside(point, box):
    return point is not None and box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


@pytest.fixture(scope="module")
def adapter():
    return load(device="cpu")


def default_boxes():
    """Phrase without article and in its bare form ("man in red jacket") -> box, of the default picture."""
    name = (demo_folder() / "default.txt").read_text().strip().rsplit("/", 1)[-1].removesuffix(".jpg")
    boxes, _ = annotations(name)
    phrases = PHRASE.findall((SCENES / "Sentences" / f"{name}.txt").read_text())
    return {phrase: boxes[chain] for chain, phrase in phrases}


def test_the_default_picture_is_a_test_scene():
    original = demo_folder() / (demo_folder() / "default.txt").read_text().strip()
    with Image.open(original) as scene, Image.open(demo_image()) as shown:  # the same, compressed less
        assert scene.size == shown.size
        assert np.abs(np.asarray(scene, float) - np.asarray(shown, float)).mean() < 4


@pytest.mark.parametrize("method", ["gradcam", "relevance"])
@pytest.mark.parametrize("who", ["man in red jacket", "woman in red jacket"])
def test_the_peak_follows_the_caption(adapter, method, who):
    boxes = default_boxes()
    found = explain(adapter, demo_image(), who, methods=[method], select=Selection(tokens=False))[0]
    assert inside(found.peak, boxes[who]), (found.peak, boxes)
    others = [box for phrase, box in boxes.items() if box != boxes[who]]
    assert not any(inside(found.peak, box) for box in others)


@pytest.mark.slow
def test_maps_point_better_than_the_centre(adapter):
    hits = {"gradcam": [], "relevance": [], "rollout": [], "centre": []}
    names = (SCENES / "test.txt").read_text().split()
    for name in [n for n in names if len(annotations(n)[0]) >= 3][:SCENES_SCORED]:
        boxes, phrases = annotations(name)
        texts = [phrase for _, phrase in phrases]
        picture = SCENES / "Images" / f"{name}.jpg"
        for (chain, _), found in zip(
            phrases, explain(adapter, picture, texts, select=Selection(tokens=False)), strict=True
        ):
            for method in ("gradcam", "relevance", "rollout"):
                hits[method].append(inside(found.map(0, method).peak, boxes[chain]))
            centre = (found.geometry.width / 2, found.geometry.height / 2)
            hits["centre"].append(inside(centre, boxes[chain]))
    rate = {method: float(np.mean(found)) for method, found in hits.items()}
    print(rate, len(hits["centre"]), "phrases")
    for method in ("gradcam", "relevance"):
        assert rate[method] > 0.8
        assert rate[method] > 3 * rate["centre"]
        assert rate[method] > 2 * rate["rollout"]  # which never sees the text
