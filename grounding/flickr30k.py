"""Reading Flickr30k Entities: pictures, captions with marked phrases, and boxes for what the phrases name.

    Images/<id>.jpg  Sentences/<id>.txt  Annotations/<id>.xml  train.txt, val.txt, test.txt: one id a line

A phrase belongs to a chain (an entity of the picture); a chain has boxes, or a reason for having none. The demo world
has the same layout, with a `heldout.txt` besides: phrases that the demo model never saw in training. A layout that is
not this one joins as a class with `recognises`, `ids`, `heldout`, `problems` and `read`, and a place in `LAYOUTS`.
"""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from grounding.decoding import BROKEN, EXIF_ORIENTATION, show
from grounding.geometry import Box
from grounding.records import Caption, DataError, Dataset, Phrase, Record, normal

# `[/EN#6729/vehicles/scene the subway]`: chain, one or more types, phrase.
MARK = re.compile(r"\[/EN#(\d+)((?:/[A-Za-z]+)+) ([^\]]*)\]")
OPENED = "[/EN"
NOTHING_VISIBLE = "0"
NAME = re.compile(r"\w[\w.-]*")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NO_SPLIT = {"captions", "heldout", "readme", "readme_entities"}
# Boxes that reach further than this over the picture's edge are reported, pixels.
OVERHANG = 1.0


def open_dataset(folder: str | Path, split: str = "test") -> Dataset:
    """One split of the data set in `folder`, whatever its layout. Raises DataError saying what is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{show(folder)}: there is no such folder; a data set is a folder with {Entities.needs}")
    for layout in LAYOUTS:
        if layout.recognises(folder):
            return layout(folder, split)
    raise DataError(f"{show(folder)} has no layout that can be read; expected {Entities.needs}")


class Entities:
    """A split of Flickr30k Entities. Records are read when they are asked for."""

    layout = "flickr30k-entities"
    needs = "Images/, Sentences/, Annotations/ and <split>.txt"

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        listing = folder / f"{split}.txt"
        if not NAME.fullmatch(split) or not listing.is_file():
            found = sorted(p.stem for p in folder.glob("*.txt") if p.stem.lower() not in NO_SPLIT)
            raise DataError(f"no split {split!r} in {show(folder)} (there are: {', '.join(found) or 'none'})")
        names = [line.strip() for line in _lines(listing)]
        good = [name for name in names if NAME.fullmatch(name)]
        self.ids = tuple(dict.fromkeys(good))
        self.problems = tuple(f"{split}.txt: {show(name)} is no id" for name in names if name and name not in good)
        if len(good) > len(self.ids):
            self.problems += (f"{split}.txt: {len(good) - len(self.ids)} ids stand there twice and count once",)
        if not self.ids:
            raise DataError(f"{show(listing)} lists no ids")
        phrases = folder / "heldout.txt"
        self.heldout = frozenset(filter(None, map(normal, _lines(phrases)))) if phrases.is_file() else None

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Whether a folder has this layout."""
        return all((folder / part).is_dir() for part in ("Images", "Sentences", "Annotations"))

    def read(self, name: str) -> Record:
        """The record of an id. Raises DataError where a file is missing or cannot be parsed as a whole."""
        if not NAME.fullmatch(name):
            raise DataError(f"{show(name)} is no id")
        captions, problems = read_sentences(self.folder / "Sentences" / f"{name}.txt")
        found = read_annotation(self.folder / "Annotations" / f"{name}.xml")
        picture = _picture_path(self.folder / "Images", name)
        boxes, doubts = _fitted(found, _upright_size(picture), name)
        named = {phrase.chain for caption in captions for phrase in caption.phrases}
        absent = {
            chain: "notvisual" if chain == NOTHING_VISIBLE else "missing" for chain in named if chain not in boxes
        }
        no_box = absent | {chain: why for chain, why in found.no_box.items() if chain not in boxes}
        return Record(name, picture, captions, boxes, no_box, (*problems, *found.problems, *doubts))


LAYOUTS = (Entities,)


# ---------------------------------------------------------------- sentences


def read_sentences(path: Path) -> tuple[tuple[Caption, ...], tuple[str, ...]]:
    """(captions, problems) of a file of Sentences/; lines with broken marks are left out, named. Raises DataError."""
    captions, problems = [], []
    lines = _lines(path)
    for number, line in enumerate(lines):
        try:
            captions.append(parse_sentence(line, number))
        except DataError as error:
            # The end of the last line is no line.
            if line.strip() or number < len(lines) - 1:
                problems.append(f"{path.name} line {number + 1}: {error}")
    if not captions:
        raise DataError("; ".join([f"{show(path)} has no caption that can be read", *problems]))
    return tuple(captions), tuple(problems)


def parse_sentence(line: str, number: int = 0) -> Caption:
    """The caption of one line: plain text, and where in it each phrase stands. Raises DataError for broken marks."""
    line = line.strip()
    text, phrases, last = "", [], 0
    for mark in MARK.finditer(line):
        text += line[last : mark.start()]
        phrase = mark[3]
        if not phrase.strip() or OPENED in phrase:
            raise DataError(f"a broken mark: {show(mark[0])}")
        phrases.append(Phrase(phrase, len(text), len(text) + len(phrase), mark[1], tuple(mark[2][1:].split("/"))))
        text += phrase
        last = mark.end()
    text += line[last:]
    if OPENED in text:
        raise DataError(f"a broken mark: {show(text[text.index(OPENED) :])}")
    if not text.strip():
        raise DataError("an empty caption")
    return Caption(text, number, tuple(phrases))


# ---------------------------------------------------------------- annotations


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
        root = ET.fromstring(_read(path))
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


def _fitted(
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


# ---------------------------------------------------------------- files


def _read(path: Path) -> str:
    """The text of a file that is read whole. Raises DataError."""
    try:
        if not path.is_file():
            raise DataError(f"{show(path)}: there is no such file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{show(path)} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{show(path)}: {error.strerror or error}") from None


def _lines(path: Path) -> list[str]:
    # Not splitlines(): a caption may hold U+2028 and its like.
    return [line.rstrip("\r") for line in _read(path).split("\n")]


def _picture_path(folder: Path, name: str) -> Path:
    """The picture of an id; where there is none, the path at which it is missed. Raises DataError for a link out."""
    names = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    path = next((path for path in names if path.is_file()), names[0])
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{show(path)}: lies outside of {show(folder)} and is not opened")
    return path


def _upright_size(path: Path) -> tuple[int, int] | None:
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
