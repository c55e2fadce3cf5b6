"""Records of a data set in any layout: images, captions with phrases, boxes; the Dataset protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from grounding.core.geometry import Box


@dataclass(frozen=True)
class Phrase:
    """A marked phrase: characters [start, end) of its caption, the chain (entity) that it names, and its types."""

    text: str
    start: int
    end: int
    chain: str
    types: tuple[str, ...]


@dataclass(frozen=True)
class Caption:
    """A caption without marks. `line` counts from 0; `phrases` are in the order of the text."""

    text: str
    line: int
    phrases: tuple[Phrase, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A caption that cannot be used. `line` counts from 0 as in `Caption`; `text` is its content, if any."""

    line: int
    error: str
    text: str = ""


@dataclass(frozen=True)
class Record:
    """One image with its captions.

    Parameters
    ----------
    image: the path of a file, or the bytes of one in a table. None: it must not be opened; all lines are failures.
    captions, failures: usable and unusable captions; together they contain each line of the image once.
    boxes: chain -> boxes (x0, y0, x1, y1), original pixels, origin top-left, half-open.
    no_box: chain without boxes -> reason: `scene`, `nobndbox`, `notvisual`, or `missing` (no usable annotation).
    problems: messages about lines and objects that could not be used unchanged.
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

    Attributes
    ----------
    layout, folder, split: name of the layout, folder or hub name, name of the split.
    ids: its images, in order.
    heldout: phrases that are not in the training data of the demo model; None if the data set has no such list.
    problems: messages to the user.
    broken: rows that belong to no image or are duplicates: name (`captions.txt:17`) -> reason.
    root: absolute path of the folder that contains all images, with links followed; None if they are no files.
    boxes: whether its phrases have boxes.
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
        """Return the record of an id. Raises DataError."""

    def digest(self) -> str:
        """Return the sha256 of the files on which `ids` and `read` depend, without the images."""


def normal(phrase: str) -> str:
    """Normalise a phrase for models and comparisons: lower case, single blanks."""
    return " ".join(phrase.lower().split())
