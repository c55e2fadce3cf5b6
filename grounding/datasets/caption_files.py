"""Parsers of files that list images and captions: delimited tables, `.token`, JSON, JSON lines.

A parser takes the text of a file and its name for messages, and returns a `ParsedListing`. It raises DataError if the
file is not in its format; rows that cannot be parsed are reported in `ParsedListing.broken`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grounding.core.errors import DataError
from grounding.core.printable import quote
from grounding.datasets.caption_lists import ListedRow, ParsedListing
from grounding.datasets.text_files import lines_of

# Column names, in lower case; the first one that a header contains is used.
FILE_COLUMNS = ("image", "file", "file_name", "filename", "image_path", "image_name")
CAPTION_COLUMNS = ("caption", "text", "sentence", "captions", "sentences", "raw", "comment")
NUMBER_COLUMNS = ("comment_number", "caption_number")
SPLIT_COLUMNS = ("split",)
DELIMITERS = ("\t", "|", ",", ";")
# `["`, or `['` as in Python's repr; a caption may begin with a single bracket.
LIST = re.compile(r"""\s*\[\s*["']""")
TOKEN_TAB = re.compile(r"(.+)#(\d+)\t(.*)", re.DOTALL)
TOKEN_BLANK = re.compile(r"(\S+)#(\d+)(?: +(.*))?", re.DOTALL)
# `2199200615.jpg| 4   A dog runs`: the number and the caption, with blanks where the separator should be.
UNSEPARATED = re.compile(r"\s*(\d+)\s+(\S.*)", re.DOTALL)


def read_listing(path: Path, text: str) -> ParsedListing:
    """Parse a listing, by the suffix of its name, and for `.txt` by its first line. Raises DataError."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return json_lines(text, path.name)
    if suffix == ".json":
        return json_document(text, path.name)
    first = text.split("\n", 1)[0]
    if suffix == ".token" or (header_of(first) is None and TOKEN_TAB.match(first)):
        return token(text, path.name)
    return delimited(text, path.name)


# ---------------------------------------------------------------- delimited


class Header(NamedTuple):
    """The header of a table: column name in lower case -> position, and `width`, the number of columns."""

    delimiter: str
    positions: Mapping[str, int]
    width: int

    def find(self, names: tuple[str, ...]) -> int | None:
        """Return the index of the first of these columns that the table has, None if it has none."""
        name = _pick(self.positions, names)
        return None if name is None else self.positions[name]


def header_of(line: str) -> Header | None:
    """Return the header in a line, None unless it has an image and a caption column. Other lines are not considered."""
    for delimiter in DELIMITERS:
        names = [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]
        header = Header(delimiter, {name: index for index, name in enumerate(names)}, len(names))
        if header.find(FILE_COLUMNS) is not None and header.find(CAPTION_COLUMNS) is not None:
            return header
    return None


def delimited(text: str, name: str) -> ParsedListing:
    """Parse a table with header: comma, semicolon or tab with quoting as in RFC 4180, or ` | ` without quoting."""
    first = text.split("\n", 1)[0].rstrip("\r")
    header = header_of(first)
    if header is None:
        raise DataError(
            f"{quote(name)} begins with {quote(first, 80)}: expected a header with an image column "
            f"({', '.join(FILE_COLUMNS)}) and a caption column ({', '.join(CAPTION_COLUMNS)}), separated by comma, "
            "semicolon, tab or |"
        )
    bare = header.delimiter == "|"
    listing = ParsedListing("kaggle-csv" if bare else "csv")
    for line, fields in _rows(text, header, listing.broken, name):
        if line == 1 or not any(field.strip() for field in fields):
            continue
        place = f"{name}:{line}"
        try:
            fields = _bare_fields(fields, header, place, listing.problems) if bare else fields
            listing.entries.append(_row(fields, header, place))
        except DataError as error:
            listing.broken[place] = str(error)
    return listing


def _rows(text: str, header: Header, broken: dict[str, str], name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, fields) of each row. After a broken quote its lines are parsed one by one."""
    fed: list[tuple[int, str]] = []

    def feed() -> Iterator[str]:
        for number, line in enumerate(io.StringIO(text, newline=""), 1):
            fed.append((number, line))
            yield line

    quoting = csv.QUOTE_NONE if header.delimiter == "|" else csv.QUOTE_MINIMAL
    dialect: dict[str, Any] = {"delimiter": header.delimiter, "strict": True, "quoting": quoting}
    reader = csv.reader(feed(), **dialect)
    while True:
        fed.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is never closed would include the rows that follow.
            yield from _one_by_one(list(fed), dialect, header.width, broken, name, str(error))
            continue
        yield fed[0][0], fields


def _one_by_one(
    lines: list[tuple[int, str]], dialect: dict[str, Any], width: int, broken: dict[str, str], name: str, why: str
) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        try:
            [fields] = csv.reader([line], **dialect)
        except (csv.Error, ValueError):
            fields = []
        if len(fields) == width:
            yield number, fields
        elif line.strip():
            broken[f"{name}:{number}"] = f"its quotes are broken ({why}): {quote(line.strip(), 80)}"


def _bare_fields(fields: list[str], header: Header, place: str, problems: list[str]) -> list[str]:
    """Return the fields of a row without quoting, without blanks around separators; repairs go to `problems`."""
    width = header.width
    if header.find(CAPTION_COLUMNS) == width - 1:  # the caption is the rest of the line, separators included
        fields = [*fields[: width - 1], "|".join(fields[width - 1 :])] if len(fields) > width else fields
        numbered = len(fields) == width - 1 and header.find(NUMBER_COLUMNS) == width - 2
        if numbered and (parts := UNSEPARATED.fullmatch(fields[-1])):
            fields = [*fields[:-1], *parts.groups()]
            problems.append(f"{place}: no separator after the number; read as caption {parts[1]} of {quote(fields[0])}")
    return [field.strip() for field in fields]


def _row(fields: list[str], header: Header, place: str) -> ListedRow:
    """Return the row of some fields. Raises DataError if they do not fit the header."""
    if len(fields) != header.width:
        hint = "; a caption with the separator in it must be quoted" if len(fields) > header.width else ""
        raise DataError(f"{len(fields)} fields, the header has {header.width}{hint}: {quote(fields[0], 80)}")

    def cell(names: tuple[str, ...]) -> str:
        column = header.find(names)
        return "" if column is None else fields[column]

    number = cell(NUMBER_COLUMNS).strip()
    if number and not number.isdecimal():
        raise DataError(f"{quote(number, 40)} is no number of a caption")
    texts, split = _texts(cell(CAPTION_COLUMNS)), cell(SPLIT_COLUMNS).strip()
    return ListedRow(place, cell(FILE_COLUMNS), texts, int(number) if number else None, split)


def _texts(cell: str) -> tuple[object, ...]:
    """Return the captions of a cell: a JSON list of texts, or the cell. Raises DataError for an invalid list."""
    if not LIST.match(cell):
        return (cell,)
    try:
        return tuple(json.loads(cell))
    except (ValueError, RecursionError):
        # As plain text, five captions would count as one.
        raise DataError(f"its captions look like a list, but are none in JSON: {quote(cell, 80)}") from None


def _pick(columns: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in columns), None)


# ---------------------------------------------------------------- token


def token(text: str, name: str) -> ParsedListing:
    """Parse lines `1000092795.jpg#0<TAB>caption`, or with blanks in place of the tab; numbers count from 0."""
    listing = ParsedListing("token")
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        match = TOKEN_TAB.fullmatch(line) or TOKEN_BLANK.fullmatch(line)
        place = f"{name}:{number}"
        if match is None:
            listing.broken[place] = f"expected <image>#<number><TAB><caption>, got {quote(line, 80)}"
        else:
            listing.entries.append(ListedRow(place, match[1], ((match[3] or "").strip(),), int(match[2])))
    return listing


# ---------------------------------------------------------------- JSON


def json_document(text: str, name: str) -> ParsedListing:
    """Parse `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`, or a list of objects as in `json_lines`."""
    document = _json(text, name)
    karpathy = isinstance(document, dict)
    things = document.get("images") if karpathy else document
    if not isinstance(things, list):
        raise DataError(f'{quote(name)}: expected {{"images": [...]}} or a list of objects')
    listing = ParsedListing("karpathy-json" if karpathy else "json")
    for number, thing in enumerate(things):
        place = f"{name}:{'images' if karpathy else ''}[{number}]"
        _add(listing, thing, place, whole=karpathy)
    return listing


def json_lines(text: str, name: str, folder: str = "") -> ParsedListing:
    """Parse one JSON object per line, with an image and a caption; `folder` is prepended to the image names."""
    listing = ParsedListing("jsonl")
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            place = f"{folder}{name}:{number}"
            try:
                thing = _json(line, place)
            except DataError as error:
                listing.broken[place] = str(error)
                continue
            _add(listing, thing, place, folder=folder)
    return listing


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{quote(name)} is no JSON that can be read ({error})") from None


def _add(listing: ParsedListing, thing: Any, place: str, *, whole: bool = False, folder: str = "") -> None:
    """Add the row of a JSON object to the listing, or the reason why it has none."""
    if not isinstance(thing, dict):
        listing.broken[place] = f"expected a JSON object, got {type(thing).__name__}"
        return
    key = _pick(thing, FILE_COLUMNS)
    image = thing.get(key) if key else None
    if not isinstance(image, str) or not image:
        listing.broken[place] = f"it names no image ({', '.join(FILE_COLUMNS)})"
        return
    if whole and isinstance(above := thing.get("filepath"), str) and above:
        image = f"{above}/{image}"
    split = thing.get("split")
    split = folder.rstrip("/") or (split if isinstance(split, str) else "")
    caption = _pick(thing, CAPTION_COLUMNS)
    texts = captions_of(thing[caption]) if caption else ()
    listing.entries.append(ListedRow(place, f"{folder}{image}", texts, None, split, whole))


def captions_of(value: object) -> tuple[object, ...]:
    """Return the captions in a value: one, or a list; of an object its `raw` text."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text.get("raw", text) if isinstance(text, dict) else text for text in values)
