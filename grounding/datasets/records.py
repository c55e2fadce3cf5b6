"""What evaluation and batch runs read, whatever the layout: pictures, captions with phrases, boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from grounding.core.geometry import Box


@dataclass(frozen=True)
class Phrase:
    """A marked phrase: characters [start, end) of its caption's plain text, the chain it names, and its types."""

    text: str
    start: int
    end: int
    chain: str
    types: tuple[str, ...]


@dataclass(frozen=True)
class Caption:
    """A caption without its marks. `line` counts from 0; `phrases` are in reading order."""

    text: str
    line: int
    phrases: tuple[Phrase, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A caption that cannot be used: its `line` counts from 0 as a caption's does, `text` is what there is."""

    line: int
    error: str
    text: str = ""


@dataclass(frozen=True)
class Record:
    """One picture with its captions.

    `image` is a file, or the bytes of one where the data set holds them itself; None: it must not be opened, and
    every line is among the failures. `failures` are captions that are
    there but cannot be used; together with `captions` every line of the data set is named once. `boxes` maps a chain to
    its boxes (x0, y0, x1, y1): original pixels, origin top-left, half-open. `no_box` says of a chain without any why:
    `scene`, `nobndbox`, `notvisual` or `missing` (no object of the annotation that can be used). `problems` are
    sentences about lines and objects that could not be used as they stand.
    """

    id: str
    image: Path | bytes | None
    captions: tuple[Caption, ...]
    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)
    no_box: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()


@runtime_checkable
class Dataset(Protocol):
    """One split of a data set, or all of it.

    `ids` are its pictures in order, `broken` the rows that belong to no picture or repeat what is listed already (a
    name for each, e.g. `captions.txt:17`, and what is wrong), `problems` what else a user must know. Pictures lie in
    `root`, links followed (None: they are no files); it and their paths are absolute. `boxes`: whether its phrases have
    boxes.
    """

    layout: str
    folder: Path
    split: str
    ids: tuple[str, ...]
    heldout: frozenset[str] | None
    problems: tuple[str, ...]
    broken: Mapping[str, str]
    root: Path | None
    boxes: bool

    def read(self, name: str) -> Record:
        """The record of an id. Raises DataError, one line."""

    def digest(self) -> str:
        """sha256 over what `ids` and `read` depend on, pictures apart: another digest, other captions."""


def normal(phrase: str) -> str:
    """A phrase as it is given to a model and compared: lower case, single blanks."""
    return " ".join(phrase.lower().split())
