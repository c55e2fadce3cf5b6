"""Flickr30k Entities: images, captions with marked phrases, and boxes of the phrases.

Source: Plummer et al. 2015, arXiv:1505.04870.

    Images/<id>.jpg  Sentences/<id>.txt  Annotations/<id>.xml  train.txt, val.txt, test.txt: one id a line

A phrase belongs to a chain (an entity of the image); a chain has boxes, or a reason for having none. The demo scenes
have the same layout and a file `heldout.txt`: phrases that are not in the training data of the demo model.
"""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from grounding.core.errors import DataError
from grounding.core.geometry import Box
from grounding.core.image_decoding import BROKEN, EXIF_ORIENTATION
from grounding.core.printable import quote
from grounding.datasets.caption_lists import ALL, sha256
from grounding.datasets.image_folder import FOLDERS, SUFFIXES, image_path, image_root
from grounding.datasets.records import Caption, Failure, Phrase, Record, normal
from grounding.datasets.text_files import decoded, read_bytes, read_lines

# `[/EN#6729/vehicles/scene the subway]`: chain, one or more types, phrase.
PHRASE_MARK = re.compile(r"\[/EN#(\d+)((?:/[A-Za-z]+)+) ([^\]]*)\]")
OPENED = "[/EN"
NOTHING_VISIBLE = "0"
ID = re.compile(r"\w[\w.-]*")
# Text files that are no lists of ids.
OTHER_FILES = {"captions", "heldout", "readme", "readme_entities", "unrelated_captions", "license"}
# All ids are those of these lists, in this order.
MAIN_SPLITS = ("train", "val", "test")


class Entities:
    """A split of Flickr30k Entities, or all of it; see `records.Dataset`. `read` parses one record."""

    layout = "flickr30k-entities"
    needs = "Images/, Sentences/, Annotations/ and <split>.txt"
    boxes = True
    root: Path | None

    def __init__(self, folder: Path, split: str | None) -> None:
        """`split` is the name of a list of ids. None or `all`: the ids of train, val and test, or without these lists
        one id for each file of Sentences/. With None a single list is opened under its name. Raises DataError."""
        self.folder = folder
        lists = [name for name in MAIN_SPLITS if (folder / f"{name}.txt").is_file()]
        if split is None and len(lists) == 1:
            split = lists[0]
        self.split = split or ALL
        self.broken: Mapping[str, str] = {}
        self.problems: tuple[str, ...] = ()
        if self.split != ALL or (folder / f"{ALL}.txt").is_file():
            lists = [self.split]
            self._check_split()
        self.ids = self._listed(lists) if lists else self._sentences()
        # Images may have another suffix than the first.
        self._images = image_root(folder, (f"{name}{suffix}" for name in self.ids[:2] for suffix in SUFFIXES))
        self.root = self._images
        phrases = folder / "heldout.txt"
        self.heldout = frozenset(filter(None, map(normal, read_lines(phrases)))) if phrases.is_file() else None

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Whether a folder has this layout."""
        parts = all((folder / part).is_dir() for part in ("Sentences", "Annotations"))
        return parts and any((folder / part).is_dir() for part in FOLDERS)

    def read(self, name: str) -> Record:
        """Return the record of an id. Raises DataError if a file is missing or cannot be parsed."""
        if not ID.fullmatch(name):
            raise DataError(f"{quote(name)} is no id")
        sentences = f"{name}.txt"
        captions, failures = read_sentences(self.folder / "Sentences" / sentences)
        found = read_annotation(self.folder / "Annotations" / f"{name}.xml")
        image = self._image(name)
        boxes, repairs = fitted(found, upright_size(image), name)
        named = {phrase.chain for caption in captions for phrase in caption.phrases}
        absent = {
            chain: "notvisual" if chain == NOTHING_VISIBLE else "missing" for chain in named if chain not in boxes
        }
        no_box = absent | {chain: why for chain, why in found.no_box.items() if chain not in boxes}
        problems = (*(_place(sentences, failure) for failure in failures), *found.problems, *repairs)
        return Record(name, image, captions, boxes, no_box, problems, failures)

    def digest(self) -> str:
        """sha256 over the ids in order with the bytes of their sentences and annotations, and over the held-out
        phrases. Reads all these files."""
        return sha256(self._content())

    def _content(self) -> Iterator[bytes]:
        for name in self.ids:
            yield name.encode()
            for part, suffix in (("Sentences", ".txt"), ("Annotations", ".xml")):
                path = self.folder / part / f"{name}{suffix}"
                # A missing file differs from an empty one.
                yield b"+" + read_bytes(path) if path.is_file() else b"-"
        yield "\n".join(sorted(self.heldout)).encode() if self.heldout is not None else b""

    def _check_split(self) -> None:
        if not ID.fullmatch(self.split) or not (self.folder / f"{self.split}.txt").is_file():
            found = sorted(p.stem for p in self.folder.glob("*.txt") if p.stem.lower() not in OTHER_FILES)
            raise DataError(
                f"no split {self.split!r} in {quote(self.folder)} (there are: {', '.join(found) or 'none'})"
            )

    def _listed(self, lists: list[str]) -> tuple[str, ...]:
        """Return the ids of some lists, in order, each once; duplicates and invalid ids go to `problems`."""
        good = []
        for part in lists:
            names = list(filter(None, (line.strip() for line in read_lines(self.folder / f"{part}.txt"))))
            good += [name for name in names if ID.fullmatch(name)]
            self.problems += tuple(f"{part}.txt: {quote(name)} is no id" for name in names if not ID.fullmatch(name))
        ids = tuple(dict.fromkeys(good))
        files = ", ".join(f"{part}.txt" for part in lists)
        if len(good) > len(ids):
            self.problems += (f"{files}: {len(good) - len(ids)} ids are listed twice and count once",)
        if not ids:
            raise DataError(f"{quote(self.folder)}: {files} lists no ids")
        return ids

    def _sentences(self) -> tuple[str, ...]:
        names = sorted(path.stem for path in (self.folder / "Sentences").glob("*.txt"))
        ids = tuple(name for name in names if ID.fullmatch(name))
        self.problems += tuple(f"Sentences/: {quote(name)} is no id" for name in names if not ID.fullmatch(name))
        if not ids:
            lists = ", ".join(MAIN_SPLITS)
            raise DataError(f"{quote(self.folder)} has no list of ids ({lists}) and no Sentences/*.txt")
        return ids

    def _image(self, name: str) -> Path:
        """Return the path of the image of an id; that of the first suffix if there is none."""
        paths = [self._images / f"{name}{suffix}" for suffix in SUFFIXES]
        path = next((path for path in paths if path.is_file()), paths[0])
        return image_path(self._images, path.name)


# ---------------------------------------------------------------- sentences


def read_sentences(path: Path) -> tuple[tuple[Caption, ...], tuple[Failure, ...]]:
    """Parse a file of Sentences/: (captions, failures) by line. Raises DataError if no line can be parsed."""
    captions, failures = [], []
    lines = read_lines(path)
    for number, line in enumerate(lines):
        try:
            captions.append(parse_sentence(line, number))
        except DataError as error:
            # The text after the last line end is no line.
            if line.strip() or number < len(lines) - 1:
                failures.append(Failure(number, str(error), line.strip()))
    if not captions:
        reasons = [_place(path.name, failure) for failure in failures]
        raise DataError("; ".join([f"{quote(path)} has no caption that can be read", *reasons]))
    return tuple(captions), tuple(failures)


def _place(name: str, failure: Failure) -> str:
    return f"{name} line {failure.line + 1}: {failure.error}"


def parse_sentence(line: str, number: int = 0) -> Caption:
    """Parse one line: the plain caption and the characters of each phrase. Raises DataError for broken marks."""
    line = line.strip()
    text, phrases, last = "", [], 0
    for mark in PHRASE_MARK.finditer(line):
        text += line[last : mark.start()]
        phrase = mark[3]
        if not phrase.strip() or OPENED in phrase:
            raise DataError(f"a broken mark: {quote(mark[0])}")
        phrases.append(Phrase(phrase, len(text), len(text) + len(phrase), mark[1], tuple(mark[2][1:].split("/"))))
        text += phrase
        last = mark.end()
    text += line[last:]
    if OPENED in text:
        raise DataError(f"a broken mark: {quote(text[text.index(OPENED) :])}")
    if not text.strip():
        raise DataError("an empty caption")
    return Caption(text, number, tuple(phrases))


# Boxes that exceed the image by more than this are reported; pixels.
OVERHANG = 1.0


@dataclass(frozen=True)
class Annotation:
    """Content of an annotation file: boxes in pixels of its `size` (width, height), or of the image if that is None."""

    size: tuple[int, int] | None
    boxes: Mapping[str, tuple[Box, ...]]
    no_box: Mapping[str, str]
    problems: tuple[str, ...] = ()


def read_annotation(path: Path) -> Annotation:
    """Parse an annotation file: boxes, or reasons for having none, by chain.

    Boxes of the file are 1-based with inclusive corners; here they are half-open: (xmin - 1, ymin - 1, xmax, ymax). An
    object may have several names and a chain several objects. Objects that cannot be used are reported in `problems`.
    Raises DataError for a file that is missing or no XML.
    """
    try:
        root = ET.fromstring(decoded(read_bytes(path), path))
    except ET.ParseError as error:
        raise DataError(f"{quote(path)} is no XML that can be read ({error})") from None
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
        problems.append(f"{path.name}: it gives no size; its boxes are taken as pixels of the image")
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
    """Return the boxes in original pixels, clipped to the image, and the changes that were made to them."""
    if size is None:  # the image cannot be opened; that is reported where it is decoded
        return dict(found.boxes), ()
    repairs = []
    width, height = size
    fx, fy = (width / found.size[0], height / found.size[1]) if found.size else (1.0, 1.0)
    if found.size and found.size != size:
        bent = "" if 0.98 < fx / fy < 1.02 else ", which has another shape: they may not fit"
        repairs.append(
            f"{name}.xml: boxes for {found.size[0]} x {found.size[1]} pixels were rescaled to the image's "
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
                relation = "is outside of" if empty else "exceeds"
                corners = tuple(round(value, 1) for value in scaled)
                repairs.append(f"{name}.xml: a box of {chain} {relation} the image ({width} x {height}): {corners}")
            kept += [] if empty else [cut]
        if kept:
            boxes[chain] = tuple(kept)
    return boxes, tuple(repairs)


def upright_size(path: Path) -> tuple[int, int] | None:
    """Return (width, height) of an upright image from its header; None if that cannot be read."""
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
