"""Flickr30k and its kin: which layout a folder has, and how it is opened.

A layout joins as a `Layout` and a place in `LAYOUTS`; the first one that recognises a folder reads it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from grounding.core.errors import DataError
from grounding.core.printable import quote
from grounding.datasets import huggingface
from grounding.datasets.caption_files import header_of, json_lines, read_listing
from grounding.datasets.caption_lists import FolderImages, ListedRow, Listing, ParsedListing, sha256
from grounding.datasets.flickr30k_entities import Entities
from grounding.datasets.image_folder import has_images, image_root, images_of
from grounding.datasets.records import Dataset
from grounding.datasets.text_files import decoded, read_bytes

# Files that are known by their names, in the order in which they are looked for.
NAMED = ("captions.txt", "captions.csv", "results.csv", "*.token", "*.token.txt", "dataset_*.json", "labels.jsonl")
TABLES = ("*.csv", "*.tsv", "*.jsonl")
LABELS = "labels.jsonl"
# What the library `datasets` writes beside its tables.
NO_LISTINGS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")
# How many entries of an unknown folder are named.
SHOWN = 5


@dataclass(frozen=True)
class Layout:
    """A layout: what is in its folder, in words, and whether its records have captions; how it is known and opened."""

    needs: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, str | None], Dataset]
    captions: bool = True


def open_dataset(folder: str | Path, split: str | None = None, *, captions_file: str | Path | None = None) -> Dataset:
    """Pictures with captions, whatever their layout.

    Parameters
    ----------
    folder: a folder whose layout is known by what is in it; a file that lists pictures, or a `.parquet` file; or a data
        set of the hub, `hf:owner/name` (`hf:owner/name@revision`), also without `hf:` where there is no such folder.
    split: a name; None or `all`: everything. With None a data set that has one split answers by its name.
    captions_file: the file that lists pictures and captions (absolute, from here or from `folder`), whatever else is
        in `folder`.

    Raises DataError, one line, saying what is missing; records that cannot be read fail one by one, in `read`.
    """
    path = Path(folder)
    if str(folder).startswith(huggingface.PREFIX) and captions_file is None:
        return huggingface.open_hub(str(folder).removeprefix(huggingface.PREFIX), split)
    if captions_file is not None:
        if not _is(path, Path.is_dir):
            raise DataError(f"{quote(folder)}: there is no such folder for the pictures of {quote(captions_file)}")
        listed = Path(captions_file)
        return _open_file(path, listed if _is(listed, Path.is_file) else path / listed, split)
    if _is(path, Path.is_file):
        return (
            huggingface.open_local(path, split)
            if huggingface.recognises(path)
            else _open_file(path.parent, path, split)
        )
    if not _is(path, Path.is_dir):
        return _open_missing(str(folder), split)
    layout = layout_of(path)
    if layout is None:
        raise DataError(f"{quote(path)} has no layout that can be read: {_seen(path)}; expected {NEEDS}")
    return layout.open(path, split)


def layout_of(folder: Path) -> Layout | None:
    """The layout of a folder, None where it has none that is known."""
    return next((layout for layout in LAYOUTS if layout.recognises(folder)), None)


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _open_missing(name: str, split: str | None) -> Dataset:
    if not huggingface.NAME.fullmatch(name) or name.startswith("."):
        raise DataError(f"{quote(name)}: there is no such folder; a data set is {NEEDS}")
    try:
        return huggingface.open_hub(name, split)
    except DataError as error:
        if str(error).startswith("no split"):
            raise
        raise DataError(f"there is no folder {quote(name)}, and {error}") from None


def _seen(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in islice(folder.iterdir(), 1000))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"there are {', '.join(map(quote, names[:SHOWN]))}{more}" if names else "it is empty"


# ---------------------------------------------------------------- one file that lists


def listings_of(folder: Path) -> list[Path]:
    """The files known to list the pictures of a folder: those of the first pattern that has any."""
    return next(filter(None, (_files(folder, pattern) for pattern in NAMED)), [])


def tables_of(folder: Path) -> list[Path]:
    """The tables of a folder that have columns for images and captions."""
    return [path for pattern in TABLES for path in _files(folder, pattern) if _is_listing(path)]


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file() and path.name not in NO_LISTINGS)


def _is_listing(path: Path) -> bool:
    """Whether the first line of a table has what it takes; lines of JSON are taken at their name."""
    if path.suffix == ".jsonl":
        return True
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return header_of(file.readline(10_000).rstrip("\r\n")) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _open_listing(folder: Path, split: str | None) -> Dataset:
    return _open_only(folder, listings_of(folder), split)


def _open_table(folder: Path, split: str | None) -> Dataset:
    return _open_only(folder, tables_of(folder), split)


def _open_only(folder: Path, found: list[Path], split: str | None) -> Dataset:
    if len(found) > 1:
        names = ", ".join(quote(path.name) for path in found)
        raise DataError(
            f"{quote(folder)} has several files that list pictures ({names}): name one of them in place of the folder"
        )
    return _open_file(folder, found[0], split)


def _open_file(folder: Path, path: Path, split: str | None) -> Dataset:
    data = read_bytes(path)
    found = read_listing(path, decoded(data, path))
    root = image_root(folder, dict.fromkeys(entry.image for entry in found.entries[:100]))
    # The plain digest of the file, as other programs print it.
    return Listing(folder, split, found, FolderImages(root), hashlib.sha256(data).hexdigest())


# ---------------------------------------------------------------- labels by split, pictures alone


def _labels(folder: Path) -> list[Path]:
    return _files(folder, f"*/{LABELS}")


def _open_labels(folder: Path, split: str | None) -> Dataset:
    """`<split>/labels.jsonl`: ids are `<split>/<file>`, for the splits may use the same names."""
    found, parts = ParsedListing("jsonl"), []
    for path in _labels(folder):
        data = read_bytes(path)
        parts += [path.parent.name.encode(), data]
        part = json_lines(decoded(data, path), path.name, f"{path.parent.name}/")
        found.entries += part.entries
        found.broken |= part.broken
    return Listing(folder, split, found, FolderImages(folder.absolute()), sha256(parts))


def _open_images(folder: Path, split: str | None) -> Dataset:
    root, names = images_of(folder)
    found = ParsedListing("pictures", [ListedRow(f"file {quote(name)}", name) for name in names])
    for path in (path for pattern in TABLES for path in _files(folder, pattern)):
        found.problems.append(f"{quote(path.name)} is not read: its first line names no image and caption columns")
    return Listing(folder, split, found, FolderImages(root), sha256(os.fsencode(name) for name in names))


LAYOUTS = (
    Layout(Entities.needs, Entities.recognises, Entities),
    Layout(
        "captions.txt, results.csv, *.token, dataset_*.json or labels.jsonl with the pictures they list",
        lambda folder: bool(listings_of(folder)),
        _open_listing,
    ),
    Layout(
        "Parquet files, or what save_to_disk of the library datasets wrote",
        huggingface.recognises,
        huggingface.open_local,
    ),
    Layout(
        "one CSV, TSV or JSONL file with columns for image and caption",
        lambda folder: bool(tables_of(folder)),
        _open_table,
    ),
    Layout("<split>/labels.jsonl", lambda folder: bool(_labels(folder)), _open_labels),
    Layout("pictures alone", has_images, _open_images, captions=False),
)
NEEDS = "; or ".join(layout.needs for layout in LAYOUTS)
