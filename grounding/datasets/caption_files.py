"""The formats of files that list pictures and captions: delimited tables, `.token`, JSON, lines of JSON.

A reader takes the text of a file and the name by which its rows are called, and gives what it `Found`; it raises
DataError where the file as a whole is not in its format. A row that cannot be read is named, the others count.
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

# Column names, in lower case; the first that a header has is taken.
IMAGES = ("image", "file", "file_name", "filename", "image_path", "image_name")
CAPTIONS = ("caption", "text", "sentence", "captions", "sentences", "raw", "comment")
NUMBERS = ("comment_number", "caption_number")
SPLITS = ("split",)
DELIMITERS = ("\t", "|", ",", ";")
# `["` or, as Python writes lists, `['`; a caption may begin with a bracket alone.
LIST = re.compile(r"""\s*\[\s*["']""")
TOKEN_TAB = re.compile(r"(.+)#(\d+)\t(.*)", re.DOTALL)
TOKEN_BLANK = re.compile(r"(\S+)#(\d+)(?: +(.*))?", re.DOTALL)
# `2199200615.jpg| 4   A dog runs`: the number and the caption, with blanks where the separator should be.
UNSEPARATED = re.compile(r"\s*(\d+)\s+(\S.*)", re.DOTALL)


def read_listing(path: Path, text: str) -> ParsedListing:
    """What a file lists, by its format: the ending of its name, and for `.txt` its first line. Raises DataError."""
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
    """`places` are those of the columns by name, lower case; `width` is the number of columns."""

    delimiter: str
    places: Mapping[str, int]
    width: int

    def place(self, names: tuple[str, ...]) -> int | None:
        """The place of the first of these columns that there is."""
        name = _pick(self.places, names)
        return None if name is None else self.places[name]


def header_of(line: str) -> Header | None:
    """The header that a line is, if it names an image and a caption column; nothing is guessed from other lines."""
    for delimiter in DELIMITERS:
        names = [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]
        header = Header(delimiter, {name: place for place, name in enumerate(names)}, len(names))
        if header.place(IMAGES) is not None and header.place(CAPTIONS) is not None:
            return header
    return None


def delimited(text: str, name: str) -> ParsedListing:
    """A table with a header: comma, semicolon, tab with fields quoted as in RFC 4180, or ` | ` without quoting."""
    first = text.split("\n", 1)[0].rstrip("\r")
    header = header_of(first)
    if header is None:
        raise DataError(
            f"{quote(name)} begins with {quote(first, 80)}: expected a header with an image column "
            f"({', '.join(IMAGES)}) and a caption column ({', '.join(CAPTIONS)}), separated by comma, "
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
    """(line number from 1, fields) of each row. After a broken quote every line of the row is tried by itself."""
    fed: list[tuple[int, str]] = []

    def feed() -> Iterator[str]:
        for number, line in enumerate(io.StringIO(text, newline=""), 1):
            fed.append((number, line))
            yield line

    quoting = csv.QUOTE_NONE if header.delimiter == "|" else csv.QUOTE_MINIMAL
    how: dict[str, Any] = {"delimiter": header.delimiter, "strict": True, "quoting": quoting}
    reader = csv.reader(feed(), **how)
    while True:
        fed.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is never closed would swallow the pictures that follow.
            yield from _one_by_one(list(fed), how, header.width, broken, name, str(error))
            continue
        yield fed[0][0], fields


def _one_by_one(
    lines: list[tuple[int, str]], how: dict[str, Any], width: int, broken: dict[str, str], name: str, why: str
) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        try:
            [fields] = csv.reader([line], **how)
        except (csv.Error, ValueError):
            fields = []
        if len(fields) == width:
            yield number, fields
        elif line.strip():
            broken[f"{name}:{number}"] = f"its quotes are broken ({why}): {quote(line.strip(), 80)}"


def _bare_fields(fields: list[str], header: Header, place: str, problems: list[str]) -> list[str]:
    """The fields of a row without quoting; what is mended is told. Blanks beside the separator do not count."""
    width = header.width
    if header.place(CAPTIONS) == width - 1:  # what follows the last separator is the caption, whatever is in it
        fields = [*fields[: width - 1], "|".join(fields[width - 1 :])] if len(fields) > width else fields
        numbered = len(fields) == width - 1 and header.place(NUMBERS) == width - 2
        if numbered and (parts := UNSEPARATED.fullmatch(fields[-1])):
            fields = [*fields[:-1], *parts.groups()]
            problems.append(f"{place}: no separator after the number; read as caption {parts[1]} of {quote(fields[0])}")
    return [field.strip() for field in fields]


def _row(fields: list[str], header: Header, place: str) -> ListedRow:
    """Raises DataError for a row that does not fit the header."""
    if len(fields) != header.width:
        hint = "; a caption with the separator in it must be quoted" if len(fields) > header.width else ""
        raise DataError(f"{len(fields)} fields, the header has {header.width}{hint}: {quote(fields[0], 80)}")

    def cell(names: tuple[str, ...]) -> str:
        column = header.place(names)
        return "" if column is None else fields[column]

    number = cell(NUMBERS).strip()
    if number and not number.isdecimal():
        raise DataError(f"{quote(number, 40)} is no number of a caption")
    return ListedRow(place, cell(IMAGES), _texts(cell(CAPTIONS)), int(number) if number else None, cell(SPLITS).strip())


def _texts(cell: str) -> tuple[object, ...]:
    """The captions of a cell: a JSON list of texts, or the one that it is. Raises DataError for another list."""
    if not LIST.match(cell):
        return (cell,)
    try:
        return tuple(json.loads(cell))
    except (ValueError, RecursionError):
        # Taken as it stands, five captions would pass for one.
        raise DataError(f"its captions look like a list, but are none in JSON: {quote(cell, 80)}") from None


def _pick(columns: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in columns), None)


# ---------------------------------------------------------------- token


def token(text: str, name: str) -> ParsedListing:
    """`1000092795.jpg#0<TAB>caption`, or blanks in place of the tab; the number counts from 0."""
    listing = ParsedListing("token")
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        match = TOKEN_TAB.fullmatch(line) or TOKEN_BLANK.fullmatch(line)
        place = f"{name}:{number}"
        if match is None:
            listing.broken[place] = f"expected <picture>#<number><TAB><caption>, got {quote(line, 80)}"
        else:
            listing.entries.append(ListedRow(place, match[1], ((match[3] or "").strip(),), int(match[2])))
    return listing


# ---------------------------------------------------------------- JSON


def json_document(text: str, name: str) -> ParsedListing:
    """`{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`, or a list of objects as in lines of JSON."""
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
    """A JSON object a line, with an image and a caption; `folder` comes before the names of its pictures."""
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
    """The entry of a JSON object, or why it is none."""
    if not isinstance(thing, dict):
        listing.broken[place] = f"expected a JSON object, got {type(thing).__name__}"
        return
    key = _pick(thing, IMAGES)
    image = thing.get(key) if key else None
    if not isinstance(image, str) or not image:
        listing.broken[place] = f"it names no picture ({', '.join(IMAGES)})"
        return
    if whole and isinstance(above := thing.get("filepath"), str) and above:
        image = f"{above}/{image}"
    split = thing.get("split")
    split = folder.rstrip("/") or (split if isinstance(split, str) else "")
    caption = _pick(thing, CAPTIONS)
    texts = captions_of(thing[caption]) if caption else ()
    listing.entries.append(ListedRow(place, f"{folder}{image}", texts, None, split, whole))


def captions_of(value: object) -> tuple[object, ...]:
    """The captions of a value: itself, or those of a list; an object is taken by its `raw` text."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text.get("raw", text) if isinstance(text, dict) else text for text in values)
