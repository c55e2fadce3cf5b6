"""What evaluation reads, whatever the layout on disk: pictures, captions with phrases, boxes of what they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from grounding.errors import GroundingError
from grounding.geometry import Box


class DataError(GroundingError):
    """A data set, or one record of it, that cannot be read."""


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
class Record:
    """One picture with its captions.

    `boxes` maps a chain to its boxes (x0, y0, x1, y1): original pixels, origin top-left, half-open. `no_box` says of a
    chain without any why: `scene`, `nobndbox`, `notvisual` or `missing` (no object of the annotation that can be used).
    `problems` are sentences about lines and objects that could not be used as they stand.
    """

    id: str
    picture: Path
    captions: tuple[Caption, ...]
    boxes: Mapping[str, tuple[Box, ...]]
    no_box: Mapping[str, str]
    problems: tuple[str, ...] = ()


@runtime_checkable
class Dataset(Protocol):
    """One split of a data set. `read` raises DataError, one line."""

    layout: str
    folder: Path
    split: str
    ids: tuple[str, ...]
    heldout: frozenset[str] | None
    problems: tuple[str, ...]

    def read(self, name: str) -> Record:
        """The record of an id."""


def normal(phrase: str) -> str:
    """A phrase as it is given to a model and compared: lower case, single blanks."""
    return " ".join(phrase.lower().split())
