"""Data sets that list images and captions: rows grouped by image, captions numbered by line.

Files are parsed in `caption_files.py`, tables of the library `datasets` in `huggingface.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from grounding.core.errors import DataError, TextError
from grounding.core.printable import quote
from grounding.core.text import check_text
from grounding.datasets.image_folder import image_path
from grounding.datasets.records import Caption, Failure, Record

# The name of all splits together.
ALL = "all"


class ListedRow(NamedTuple):
    """One row of a listing: an image and its texts, unchecked (texts that are no captions are reported later).

    `place` is the unique name of the row in messages (`captions.txt:17`). `number` is the line of the first text; None:
    the next one of its image. `whole`: the row lists all texts of its image, which may have no second row.
    """

    place: str
    image: str
    texts: tuple[object, ...] = ()
    number: int | None = None
    split: str = ""
    whole: bool = False


@dataclass
class ParsedListing:
    """Content of a parsed file: rows, broken rows (place -> reason), and other problems for the user."""

    layout: str
    entries: list[ListedRow] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@runtime_checkable
class Images(Protocol):
    """Storage of the images of a listing."""

    @property
    def root(self) -> Path | None:
        """The absolute path of their folder; None if they are no files."""

    def image(self, name: str) -> Path | bytes:
        """Return the path or the bytes of a listed image. Raises DataError."""


@dataclass(frozen=True)
class FolderImages:
    """Images stored as files below `root`."""

    root: Path

    def image(self, name: str) -> Path:
        """Return the path of an image, which may not exist. Raises DataError for a path outside of `root`."""
        return image_path(self.root, name)


class _Group:
    """The texts of one image, by line."""

    __slots__ = ("lines", "place", "split", "whole")

    def __init__(self, entry: ListedRow) -> None:
        self.place, self.split, self.whole = entry.place, entry.split, entry.whole
        self.lines: dict[int, object] = {}


class Listing:
    """A data set of images with captions, without boxes. See `records.Dataset`."""

    heldout: frozenset[str] | None = None
    boxes = False
    broken: Mapping[str, str]

    def __init__(self, folder: Path, split: str | None, found: ParsedListing, images: Images, digest: str) -> None:
        """`digest` is the sha256 of the parsed files. Raises DataError for a split that does not exist."""
        self.layout, self.folder, self._images, self._digest = found.layout, folder, images, digest
        self.root = images.root
        groups, repeated = grouped(found.entries)
        self.broken = found.broken | repeated
        self.problems = tuple(found.problems)
        if not groups:
            why = next((f": {place}: {reason}" for place, reason in self.broken.items()), "")
            raise DataError(f"{quote(folder)} lists no images{why}")
        self.split, self._groups = _selected(groups, split, folder)
        self.ids = tuple(self._groups)

    def read(self, name: str) -> Record:
        """Return the record of an image; its `image` is None if the path is outside of the data set.

        Raises DataError for an image that is not listed.
        """
        if name not in self._groups:
            raise DataError(f"{quote(name)} is not listed in {quote(self.folder)}")
        try:
            image = self._images.image(name)
        except DataError as error:
            lines = sorted(self._groups[name].lines.items()) or [(0, "")]
            return Record(
                name, None, (), failures=tuple(Failure(line, str(error), _shown(text)) for line, text in lines)
            )
        captions, failures = [], []
        for line, text in sorted(self._groups[name].lines.items()):
            try:
                captions.append(Caption(check_text(text), line))
            except TextError as error:
                failures.append(Failure(line, str(error), _shown(text)))
        return Record(name, image, tuple(captions), failures=tuple(failures))

    def digest(self) -> str:
        """sha256 of the parsed files; for tables of `datasets`, of ids and captions."""
        return self._digest


def grouped(entries: Iterable[ListedRow]) -> tuple[dict[str, _Group], dict[str, str]]:
    """Return (image -> its rows, in order of first appearance; place -> reason of rows that do not fit)."""
    groups: dict[str, _Group] = {}
    broken: dict[str, str] = {}
    bare: list[ListedRow] = []
    for entry in entries:
        if not entry.image or not _is_unicode(entry.image):
            broken[entry.place] = "its name is not valid Unicode" if entry.image else "it names no image"
            continue
        group = groups.get(entry.image)
        if group is None:
            group = groups[entry.image] = _Group(entry)
        elif reason := _misfit(group, entry):
            broken[entry.place] = reason
            continue
        first = entry.number if entry.number is not None else len(group.lines)
        group.lines.update(enumerate(entry.texts, first))
        bare += [] if entry.texts else [entry]
    # An image without any caption is valid; an empty row beside others is not.
    broken |= {entry.place: f"no caption of {quote(entry.image)}" for entry in bare if groups[entry.image].lines}
    return groups, broken


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: JSON and file names may contain lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: object) -> str:
    """Return an unusable caption as valid Unicode, for reports; empty if it is no text."""
    return text.encode(errors="backslashreplace").decode() if isinstance(text, str) else ""


def _misfit(group: _Group, entry: ListedRow) -> str | None:
    if group.whole or entry.whole:
        return f"{quote(entry.image)} is listed already ({group.place})"
    if group.split != entry.split:
        return f"{quote(entry.image)} is listed already, in split {group.split!r} ({group.place})"
    if entry.number in group.lines:
        return f"{quote(entry.image)} has a caption number {entry.number} already ({group.place} or later)"
    return None


def _selected(groups: dict[str, _Group], split: str | None, folder: Path) -> tuple[str, dict[str, _Group]]:
    """Return (name, groups) of a split; None: the only split under its name, or all. Raises DataError."""
    known = tuple(dict.fromkeys(group.split for group in groups.values()))
    if split is None or split == ALL:
        return (known[0] if split is None and len(known) == 1 and known[0] else ALL), groups
    chosen = {name: group for name, group in groups.items() if group.split == split}
    if not split or not chosen:
        named = ", ".join(filter(None, known))
        there = f"there are: {named}; or {ALL}" if named else f"it has no splits: leave it out, or use {ALL}"
        raise DataError(f"no split {split!r} in {quote(folder)} ({there})")
    return split, chosen


def sha256(parts: Iterable[bytes]) -> str:
    """Return the digest of a sequence of parts; their boundaries are part of it."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()
