"""Reading Flickr30k Entities: pictures, captions with marked phrases, and boxes for what the phrases name.

    Images/<id>.jpg  Sentences/<id>.txt  Annotations/<id>.xml  train.txt, val.txt, test.txt: one id a line

A phrase belongs to a chain (an entity of the picture); a chain has boxes, or a reason for having none. The demo world
has the same layout, with a `heldout.txt` besides: phrases that the demo model never saw in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from grounding.core.errors import DataError
from grounding.core.image_decoding import show
from grounding.datasets.annotations import fitted, read_annotation, upright_size
from grounding.datasets.caption_lists import ALL, sha256
from grounding.datasets.image_folder import FOLDERS, SUFFIXES, picture_path, picture_root
from grounding.datasets.records import Caption, Failure, Phrase, Record, normal
from grounding.datasets.text_files import read_bytes, read_lines

# `[/EN#6729/vehicles/scene the subway]`: chain, one or more types, phrase.
MARK = re.compile(r"\[/EN#(\d+)((?:/[A-Za-z]+)+) ([^\]]*)\]")
OPENED = "[/EN"
NOTHING_VISIBLE = "0"
NAME = re.compile(r"\w[\w.-]*")
# Text files beside the lists of ids.
NO_SPLIT = {"captions", "heldout", "readme", "readme_entities", "unrelated_captions", "license"}
# In this order they make up the whole.
SPLITS = ("train", "val", "test")


class Entities:
    """A split of Flickr30k Entities, or all of it. Records are read when they are asked for."""

    layout = "flickr30k-entities"
    needs = "Images/, Sentences/, Annotations/ and <split>.txt"
    boxes = True
    root: Path | None

    def __init__(self, folder: Path, split: str | None) -> None:
        """`split` is the name of a list of ids; None or `all`: those of train, val and test, or where there are none
        of these, one id for every file of Sentences/. With None a single list answers by its name."""
        self.folder = folder
        lists = [name for name in SPLITS if (folder / f"{name}.txt").is_file()]
        if split is None and len(lists) == 1:
            split = lists[0]
        self.split = split or ALL
        self.broken: Mapping[str, str] = {}
        self.problems: tuple[str, ...] = ()
        if self.split != ALL or (folder / f"{ALL}.txt").is_file():
            lists = [self.split]
            self._check_split()
        self.ids = self._listed(lists) if lists else self._sentences()
        # Pictures may lie under another suffix than the first.
        self._images = picture_root(folder, (f"{name}{suffix}" for name in self.ids[:2] for suffix in SUFFIXES))
        self.root = self._images
        phrases = folder / "heldout.txt"
        self.heldout = frozenset(filter(None, map(normal, read_lines(phrases)))) if phrases.is_file() else None

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Whether a folder has this layout."""
        parts = all((folder / part).is_dir() for part in ("Sentences", "Annotations"))
        return parts and any((folder / part).is_dir() for part in FOLDERS)

    def read(self, name: str) -> Record:
        """The record of an id. Raises DataError where a file is missing or cannot be parsed as a whole."""
        if not NAME.fullmatch(name):
            raise DataError(f"{show(name)} is no id")
        sentences = f"{name}.txt"
        captions, failures = read_sentences(self.folder / "Sentences" / sentences)
        found = read_annotation(self.folder / "Annotations" / f"{name}.xml")
        picture = self._picture(name)
        boxes, doubts = fitted(found, upright_size(picture), name)
        named = {phrase.chain for caption in captions for phrase in caption.phrases}
        absent = {
            chain: "notvisual" if chain == NOTHING_VISIBLE else "missing" for chain in named if chain not in boxes
        }
        no_box = absent | {chain: why for chain, why in found.no_box.items() if chain not in boxes}
        problems = (*(_place(sentences, failure) for failure in failures), *found.problems, *doubts)
        return Record(name, picture, captions, boxes, no_box, problems, failures)

    def digest(self) -> str:
        """sha256 over the ids in order with the bytes of their sentences and annotations, and over the held-out
        phrases. Reads all these files."""
        return sha256(self._content())

    def _content(self) -> Iterator[bytes]:
        for name in self.ids:
            yield name.encode()
            for part, suffix in (("Sentences", ".txt"), ("Annotations", ".xml")):
                path = self.folder / part / f"{name}{suffix}"
                # A file that is missing is no empty one.
                yield b"+" + read_bytes(path) if path.is_file() else b"-"
        yield "\n".join(sorted(self.heldout)).encode() if self.heldout is not None else b""

    def _check_split(self) -> None:
        if not NAME.fullmatch(self.split) or not (self.folder / f"{self.split}.txt").is_file():
            found = sorted(p.stem for p in self.folder.glob("*.txt") if p.stem.lower() not in NO_SPLIT)
            raise DataError(f"no split {self.split!r} in {show(self.folder)} (there are: {', '.join(found) or 'none'})")

    def _listed(self, lists: list[str]) -> tuple[str, ...]:
        """The ids of some lists, in order; what is no id, and what stands there twice, is told."""
        good = []
        for part in lists:
            names = list(filter(None, (line.strip() for line in read_lines(self.folder / f"{part}.txt"))))
            good += [name for name in names if NAME.fullmatch(name)]
            self.problems += tuple(f"{part}.txt: {show(name)} is no id" for name in names if not NAME.fullmatch(name))
        ids = tuple(dict.fromkeys(good))
        files = ", ".join(f"{part}.txt" for part in lists)
        if len(good) > len(ids):
            self.problems += (f"{files}: {len(good) - len(ids)} ids stand there twice and count once",)
        if not ids:
            raise DataError(f"{show(self.folder)}: {files} lists no ids")
        return ids

    def _sentences(self) -> tuple[str, ...]:
        names = sorted(path.stem for path in (self.folder / "Sentences").glob("*.txt"))
        ids = tuple(name for name in names if NAME.fullmatch(name))
        self.problems += tuple(f"Sentences/: {show(name)} is no id" for name in names if not NAME.fullmatch(name))
        if not ids:
            raise DataError(f"{show(self.folder)} has no list of ids ({', '.join(SPLITS)}) and no Sentences/*.txt")
        return ids

    def _picture(self, name: str) -> Path:
        """The picture of an id; where there is none, the path at which it is missed."""
        paths = [self._images / f"{name}{suffix}" for suffix in SUFFIXES]
        path = next((path for path in paths if path.is_file()), paths[0])
        return picture_path(self._images, path.name)


# ---------------------------------------------------------------- sentences


def read_sentences(path: Path) -> tuple[tuple[Caption, ...], tuple[Failure, ...]]:
    """(captions, failures) of a file of Sentences/, by line. Raises DataError where no line can be read."""
    captions, failures = [], []
    lines = read_lines(path)
    for number, line in enumerate(lines):
        try:
            captions.append(parse_sentence(line, number))
        except DataError as error:
            # The end of the last line is no line.
            if line.strip() or number < len(lines) - 1:
                failures.append(Failure(number, str(error), line.strip()))
    if not captions:
        reasons = [_place(path.name, failure) for failure in failures]
        raise DataError("; ".join([f"{show(path)} has no caption that can be read", *reasons]))
    return tuple(captions), tuple(failures)


def _place(name: str, failure: Failure) -> str:
    return f"{name} line {failure.line + 1}: {failure.error}"


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
