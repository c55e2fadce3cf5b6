"""Reading lines of text with a box for every character.

    <split>/labels.jsonl  <split>/<file>     or, where there are no splits:     labels.jsonl  <file>

Each line of `labels.jsonl` is a JSON object: `file` (a picture in the same folder), `text`, `chars` (one box
[x0, y0, x1, y1] per character of the text, blanks too; pixels of the picture, origin top-left, half-open), and, where
known, `unseen_face` (whether the model was not trained on that face) and `polarity` (`dark` on light, `light` on dark).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.core.errors import DataError
from grounding.core.geometry import Box
from grounding.core.printable import quote
from grounding.core.text import check_text
from grounding.datasets.flickr30k_entities import OVERHANG

LABELS = "labels.jsonl"
NEEDS = f"<split>/{LABELS}, or {LABELS} where there are no splits"
SPLIT = "test"
FACES = {False: "seen faces", True: "unseen faces"}
POLARITIES = {"dark": "dark on light", "light": "light on dark"}
# The groups of lines that are reported apart.
GROUPS = (*FACES.values(), *POLARITIES.values())


@dataclass(frozen=True)
class Line:
    """A picture of one line. `boxes` has one box per character of `text`, original pixels, half-open; `number` is the
    line's own in its labels file, from 1. None: the file does not say."""

    number: int
    image: Path
    text: str
    boxes: tuple[Box, ...]
    unseen_face: bool | None = None
    polarity: str | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """Those of GROUPS that this line belongs to."""
        face = [] if self.unseen_face is None else [FACES[self.unseen_face]]
        return (*face, *([] if self.polarity is None else [POLARITIES[self.polarity]]))

    def misfit(self, width: int, height: int) -> str | None:
        """What is wrong with the boxes if the picture has this size, in pixels; None: nothing."""
        for i, (x0, y0, x1, y1) in enumerate(self.boxes):
            if max(-x0, -y0, x1 - width, y1 - height) > OVERHANG:
                return (
                    f"the box of character {i} {self.text[i]!r} reaches over the picture ({width} x {height}): "
                    f"{(x0, y0, x1, y1)}"
                )
        return None


@dataclass(frozen=True)
class Lines:
    """One split of a folder of lines; `split` is None where the folder has none."""

    folder: Path
    split: str | None
    labels: Path
    lines: tuple[Line, ...]

    def place(self, line: Line) -> str:
        """Where a line stands, for messages."""
        return f"{quote(self.labels)} line {line.number}"


def recognises(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / LABELS).is_file() or bool(splits_of(folder))


def splits_of(folder: Path) -> tuple[str, ...]:
    """The names of the splits in a folder of lines."""
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{LABELS}") if path.is_file()))


def open_lines(folder: str | Path, split: str | None = None) -> Lines:
    """A split of the lines in `folder` (None: the test split, or all where there are no splits).

    Raises DataError, one line: a folder without this layout, no such split, a labels file that is malformed.
    """
    folder = Path(folder)
    known = splits_of(folder)
    if not known and (folder / LABELS).is_file():
        if split is not None:
            raise DataError(f"no split {split!r} in {quote(folder)} (it has no splits, its lines stand in {LABELS})")
        return _read(folder, folder, None)
    if not known:
        raise DataError(f"{quote(folder)} has no lines that can be read; expected {NEEDS}")
    split = SPLIT if split is None else split
    if split not in known:
        raise DataError(f"no split {split!r} in {quote(folder)} (there are: {', '.join(known)})")
    return _read(folder, folder / split, split)


# ---------------------------------------------------------------- labels


def _read(folder: Path, home: Path, split: str | None) -> Lines:
    labels = home / LABELS
    found: dict[Path, Line] = {}
    for number, content in _contents(labels):
        try:
            line = _line(home, number, content)
            if line.image in found:
                raise DataError(f"the file {quote(line.image.name)} stands in line {found[line.image].number}, too")
        except ValueError as error:
            raise DataError(f"{quote(labels)} line {number}: {error}") from None
        found[line.image] = line
    if not found:
        raise DataError(f"{quote(labels)} has no lines")
    return Lines(folder, split, labels, tuple(found.values()))


def _contents(labels: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and content of the lines of a labels file that are not blank."""
    try:
        text = labels.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{quote(labels)} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{quote(labels)}: {error.strerror or error}") from None
    # Not splitlines(): a text may hold U+2028 and its like.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _line(home: Path, number: int, content: str) -> Line:
    """One line of a labels file. Raises DataError or TextError, without the line's number."""
    try:
        label = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is no JSON that can be read ({error})") from None
    if not isinstance(label, dict):
        raise DataError(f"expected a JSON object, got {type(label).__name__}")
    if missing := [key for key in ("file", "text", "chars") if key not in label]:
        raise DataError(f"it has no {' and no '.join(map(repr, missing))}")
    text, boxes = check_text(label["text"]), _boxes(label)
    face, polarity = label.get("unseen_face"), label.get("polarity")
    if face is not None and not isinstance(face, bool):
        raise DataError(f"unseen_face must be true or false, got {face!r}")
    if polarity is not None and (not isinstance(polarity, str) or polarity not in POLARITIES):
        raise DataError(f"polarity must be one of {', '.join(POLARITIES)}, got {polarity!r}")
    # What a model writes has no blanks around it.
    kept = slice(len(text) - len(text.lstrip()), len(text.rstrip()))
    return Line(number, _image(home, label["file"]), text[kept], boxes[kept], face, polarity)


def _boxes(label: dict[str, Any]) -> tuple[Box, ...]:
    text, chars = label["text"], label["chars"]
    if not isinstance(chars, list):
        raise DataError(f"chars must be a list of boxes, got {type(chars).__name__}")
    if len(chars) != len(text):
        raise DataError(f"{len(chars)} boxes for the {len(text)} characters of {quote(text)}")
    return tuple(_box(i, sign, corners) for i, (sign, corners) in enumerate(zip(text, chars, strict=True)))


def _box(place: int, sign: str, corners: Any) -> Box:
    def bad(why: str) -> DataError:
        return DataError(f"the box of character {place} {sign!r} {why}: {quote(corners)}")

    numbers = isinstance(corners, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in corners)
    if not numbers or len(corners) != 4:
        raise bad("is not four numbers")
    if not all(abs(value) <= sys.float_info.max for value in corners):
        raise bad("is not finite")
    x0, y0, x1, y1 = corners
    # A blank may have no width.
    if not (x0 <= x1 and y0 <= y1 and (sign.isspace() or (x0 < x1 and y0 < y1))):
        raise bad("ends before it begins")
    return float(x0), float(y0), float(x1), float(y1)


def _image(home: Path, name: Any) -> Path:
    """The path of a picture. Raises DataError for one that lies elsewhere, links followed."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"file must be the name of a picture, got {name!r}")
    path = home / name
    if not path.resolve().is_relative_to(home.resolve()):
        raise DataError(f"the file {quote(name)} lies outside of {quote(home)} and is not opened")
    return path
