"""The boxes of Flickr30k Entities: `Annotations/<id>.xml`, and how they come into the pixels of a picture."""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from grounding.core.errors import DataError
from grounding.core.geometry import Box
from grounding.core.image_decoding import BROKEN, EXIF_ORIENTATION, show
from grounding.datasets.text_files import decoded, read_bytes

# Boxes that reach further than this over the picture's edge are reported, pixels.
OVERHANG = 1.0


@dataclass(frozen=True)
class Annotation:
    """What an XML file says: boxes in the frame of its own `size` (width, height), None where it gives none."""

    size: tuple[int, int] | None
    boxes: Mapping[str, tuple[Box, ...]]
    no_box: Mapping[str, str]
    problems: tuple[str, ...] = ()


def read_annotation(path: Path) -> Annotation:
    """Boxes and reasons by chain. In the file boxes are 1-based and inclusive: (xmin - 1, ymin - 1, xmax, ymax) here.

    An object may have several names and a chain several objects. Objects that cannot be used are named in `problems`.
    Raises DataError for a file that is missing or no XML.
    """
    try:
        root = ET.fromstring(decoded(read_bytes(path), path))
    except ET.ParseError as error:
        raise DataError(f"{show(path)} is no XML that can be read ({error})") from None
    boxes: dict[str, list[Box]] = {}
    no_box: dict[str, str] = {}
    problems = []
    for number, thing in enumerate(root.iter("object"), 1):
        chains = [name.text.strip() for name in thing.findall("name") if name.text and name.text.strip()]
        try:
            found = _box_of(thing) if chains else None
        except DataError as error:
            problems.append(f"{path.name} object {number}: {error}")
            continue
        if not chains:
            problems.append(f"{path.name} object {number}: it has no name")
        for chain in chains:
            if found is None:
                no_box[chain] = "scene" if thing.findtext("scene", "0").strip() == "1" else "nobndbox"
            else:
                boxes.setdefault(chain, []).append(found)
    size = _size_of(root)
    if size is None:
        problems.append(f"{path.name}: it gives no size; its boxes are taken as pixels of the picture")
    return Annotation(size, {c: tuple(b) for c, b in boxes.items()}, no_box, tuple(problems))


def _box_of(thing: ET.Element) -> Box | None:
    corners = thing.find("bndbox")
    if corners is None:
        return None
    texts = [corners.findtext(tag, "") for tag in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)
    except ValueError:
        raise DataError(f"its box {texts} is not four numbers") from None
    if not (x0 <= x1 and y0 <= y1):
        raise DataError(f"its box {texts} ends before it begins")
    return x0 - 1, y0 - 1, x1, y1


def _size_of(root: ET.Element) -> tuple[int, int] | None:
    texts = (root.findtext("size/width", "").strip(), root.findtext("size/height", "").strip())
    if not all(text.isdecimal() and int(text) > 0 for text in texts):
        return None
    return int(texts[0]), int(texts[1])


def fitted(
    found: Annotation, size: tuple[int, int] | None, name: str
) -> tuple[dict[str, tuple[Box, ...]], tuple[str, ...]]:
    """Boxes in the picture's own pixels, cut to it, and what had to be done to them."""
    if size is None:  # the picture cannot be opened; whoever needs it will say so
        return dict(found.boxes), ()
    doubts = []
    width, height = size
    fx, fy = (width / found.size[0], height / found.size[1]) if found.size else (1.0, 1.0)
    if found.size and found.size != size:
        bent = "" if 0.98 < fx / fy < 1.02 else ", which has another shape: they may not fit"
        doubts.append(
            f"{name}.xml: boxes for {found.size[0]} x {found.size[1]} pixels were rescaled to the picture's "
            f"{width} x {height}{bent}"
        )
    boxes: dict[str, tuple[Box, ...]] = {}
    for chain, own in found.boxes.items():
        kept = []
        for x0, y0, x1, y1 in own:
            scaled = (x0 * fx, y0 * fy, x1 * fx, y1 * fy)
            cut = (max(scaled[0], 0.0), max(scaled[1], 0.0), min(scaled[2], width), min(scaled[3], height))
            empty = cut[0] >= cut[2] or cut[1] >= cut[3]
            if empty or max(abs(a - b) for a, b in zip(scaled, cut, strict=True)) > OVERHANG:
                what = "lies outside of" if empty else "reaches over"
                corners = tuple(round(value, 1) for value in scaled)
                doubts.append(f"{name}.xml: a box of {chain} {what} the picture ({width} x {height}): {corners}")
            kept += [] if empty else [cut]
        if kept:
            boxes[chain] = tuple(kept)
    return boxes, tuple(doubts)


def upright_size(path: Path) -> tuple[int, int] | None:
    """(width, height) from the header, EXIF orientation applied; None where that cannot be read."""
    if not path.is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else image.size
    except (*BROKEN, Image.DecompressionBombError):
        return None
