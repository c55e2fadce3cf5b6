"""Data sets of text lines for OCR, with a box for every character.

    <split>/labels.jsonl  <split>/<file>     or, where there are no splits:     labels.jsonl  <file>

Each line of `labels.jsonl` is a JSON object: `file` (an image in the same folder), `text`, `chars` (one box
[x0, y0, x1, y1] per character of the text, blanks included; original pixels, origin top-left, half-open). Optional:
`unseen_face` (whether the typeface is not in the training data of the model) and `polarity` (`dark` on light, `light`
on dark).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.core.errors import DataError
from grounding.core.geometry import Box
from grounding.core.printable import quote
from grounding.core.text import check_text
from grounding.datasets.flickr30k_entities import OVERHANG
from grounding.datasets.text_files import LABELS, read_lines

NEEDS = f"<split>/{LABELS}, or {LABELS} where there are no splits"
DEFAULT_SPLIT = "test"
FACES = {False: "seen faces", True: "unseen faces"}
POLARITIES = {"dark": "dark on light", "light": "light on dark"}
# Groups of lines with scores of their own.
GROUPS = (*FACES.values(), *POLARITIES.values())


@dataclass(frozen=True)
class Line:
    """An image of one text line.

    `boxes` has one box per character of `text`: (x0, y0, x1, y1), original pixels, half-open. `number` is the line in
    the labels file, from 1. `unseen_face`, `polarity`: None if they are not given.
    """

    number: int
    image: Path
    text: str
    boxes: tuple[Box, ...]
    unseen_face: bool | None = None
    polarity: str | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """The members of GROUPS to which this line belongs."""
        face = [] if self.unseen_face is None else [FACES[self.unseen_face]]
        return (*face, *([] if self.polarity is None else [POLARITIES[self.polarity]]))

    def misfit(self, width: int, height: int) -> str | None:
        """Return the error of boxes that exceed an image of this size, pixels; None if there is none."""
        for i, (x0, y0, x1, y1) in enumerate(self.boxes):
            if max(-x0, -y0, x1 - width, y1 - height) > OVERHANG:
                return (
                    f"the box of character {i} {self.text[i]!r} exceeds the image ({width} x {height}): "
                    f"{(x0, y0, x1, y1)}"
                )
        return None


@dataclass(frozen=True)
class Lines:
    """One split of a folder of lines; `split` is None if the folder has no splits."""

    folder: Path
    split: str | None
    labels: Path
    lines: tuple[Line, ...]

    def place(self, line: Line) -> str:
        """Return file and number of a line, for messages."""
        return f"{quote(self.labels)} line {line.number}"


def recognises(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / LABELS).is_file() or bool(splits_of(folder))


def splits_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the splits in a folder of lines."""
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{LABELS}") if path.is_file()))


def open_lines(folder: str | Path, split: str | None = None) -> Lines:
    """Open a split of the lines in `folder` (None: the test split, or all lines if there are no splits).

    Raises DataError for a folder without this layout, a split that does not exist, and a malformed labels file.
    """
    folder = Path(folder)
    known = splits_of(folder)
    if not known and (folder / LABELS).is_file():
        if split is not None:
            raise DataError(f"no split {split!r} in {quote(folder)} (it has no splits, its lines are in {LABELS})")
        return _read(folder, folder, None)
    if not known:
        raise DataError(f"{quote(folder)} has no lines that can be read; expected {NEEDS}")
    split = DEFAULT_SPLIT if split is None else split
    if split not in known:
        raise DataError(f"no split {split!r} in {quote(folder)} (there are: {', '.join(known)})")
    return _read(folder, folder / split, split)


# ---------------------------------------------------------------- labels


def _read(folder: Path, home: Path, split: str | None) -> Lines:
    labels = home / LABELS
    found: dict[Path, Line] = {}
    for number, content in enumerate(read_lines(labels), 1):
        if not content.strip():
            continue
        try:
            line = _line(home, number, content)
            if line.image in found:
                raise DataError(f"the file {quote(line.image.name)} is in line {found[line.image].number}, too")
        except ValueError as error:
            raise DataError(f"{quote(labels)} line {number}: {error}") from None
        found[line.image] = line
    if not found:
        raise DataError(f"{quote(labels)} has no lines")
    return Lines(folder, split, labels, tuple(found.values()))


def _line(home: Path, number: int, content: str) -> Line:
    """Parse one line of a labels file. Raises DataError or TextError, without the number of the line."""
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
    # Generated text has no blanks around it.
    kept = slice(len(text) - len(text.lstrip()), len(text.rstrip()))
    return Line(number, _image(home, label["file"]), text[kept], boxes[kept], face, polarity)


def _boxes(label: dict[str, Any]) -> tuple[Box, ...]:
    text, chars = label["text"], label["chars"]
    if not isinstance(chars, list):
        raise DataError(f"chars must be a list of boxes, got {type(chars).__name__}")
    if len(chars) != len(text):
        raise DataError(f"{len(chars)} boxes for the {len(text)} characters of {quote(text)}")
    return tuple(_box(i, sign, corners) for i, (sign, corners) in enumerate(zip(text, chars, strict=True)))


def _box(index: int, sign: str, corners: Any) -> Box:
    def bad(why: str) -> DataError:
        return DataError(f"the box of character {index} {sign!r} {why}: {quote(corners)}")

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
    """Return the path of an image. Raises DataError for a path outside of its folder, with links followed."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"file must be the name of an image, got {name!r}")
    path = home / name
    if not path.resolve().is_relative_to(home.resolve()):
        raise DataError(f"the file {quote(name)} is outside of {quote(home)} and is not opened")
    return path
