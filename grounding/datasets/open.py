"""Open a data set of images and captions: recognise the layout of a folder, file or hub name.

To add a layout, add a `DatasetLayout` to `LAYOUTS`; a folder is opened by the first one that recognises it.
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
from grounding.datasets.text_files import LABELS, decoded, read_bytes

# Names of listings, in the order in which they are looked for.
LISTING_FILES = ("captions.txt", "captions.csv", "results.csv", "*.token", "*.token.txt", "dataset_*.json", LABELS)
TABLE_FILES = ("*.csv", "*.tsv", "*.jsonl")
# Files of the library `datasets` beside its tables.
NO_LISTINGS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")
# Number of files of an unknown folder in a message.
SHOWN = 5


@dataclass(frozen=True)
class DatasetLayout:
    """A layout: `needs`, its files in words; functions to recognise and open it; whether its records have captions."""

    needs: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, str | None], Dataset]
    captions: bool = True


def open_dataset(folder: str | Path, split: str | None = None, *, captions_file: str | Path | None = None) -> Dataset:
    """Open a data set of images with captions, in any known layout.

    Parameters
    ----------
    folder: a folder; a file that lists images, or a `.parquet` file; or a data set on the hub, `hf:owner/name` or
        `hf:owner/name@revision` (without `hf:` if there is no such folder).
    split: the name of a split; None or `all`: all of them. With None a single split is opened under its name.
    captions_file: the file that lists images and captions, absolute or relative to the working directory or to
        `folder`; other files of `folder` are then ignored.

    Raises DataError with what is missing. Records that cannot be read raise DataError in `Dataset.read`.
    """
    path = Path(folder)
    if str(folder).startswith(huggingface.PREFIX) and captions_file is None:
        return huggingface.open_hub(str(folder).removeprefix(huggingface.PREFIX), split)
    if captions_file is not None:
        if not _is(path, Path.is_dir):
            raise DataError(f"{quote(folder)}: there is no such folder for the images of {quote(captions_file)}")
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


def layout_of(folder: Path) -> DatasetLayout | None:
    """Return the layout of a folder, None if it has no known one."""
    return next((layout for layout in LAYOUTS if layout.recognises(folder)), None)


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _open_missing(name: str, split: str | None) -> Dataset:
    if not huggingface.HUB_NAME.fullmatch(name) or name.startswith("."):
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


# ---------------------------------------------------------------- listings in one file


def listings_of(folder: Path) -> list[Path]:
    """Return the listings of a folder: the files of the first pattern of LISTING_FILES that has any."""
    return next(filter(None, (_files(folder, pattern) for pattern in LISTING_FILES)), [])


def tables_of(folder: Path) -> list[Path]:
    """Return the tables of a folder that have columns for images and captions."""
    return [path for pattern in TABLE_FILES for path in _files(folder, pattern) if _is_listing(path)]


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file() and path.name not in NO_LISTINGS)


def _is_listing(path: Path) -> bool:
    """Whether the first line of a table has the required columns; JSON lines are accepted by their suffix."""
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
            f"{quote(folder)} has several files that list images ({names}): name one of them in place of the folder"
        )
    return _open_file(folder, found[0], split)


def _open_file(folder: Path, path: Path, split: str | None) -> Dataset:
    data = read_bytes(path)
    found = read_listing(path, decoded(data, path))
    root = image_root(folder, dict.fromkeys(entry.image for entry in found.entries[:100]))
    # The plain digest of the file, as `sha256sum` prints it.
    return Listing(folder, split, found, FolderImages(root), hashlib.sha256(data).hexdigest())


# ---------------------------------------------------------------- labels by split, images without captions


def _labels(folder: Path) -> list[Path]:
    return _files(folder, f"*/{LABELS}")


def _open_labels(folder: Path, split: str | None) -> Dataset:
    """Open `<split>/labels.jsonl`; ids are `<split>/<file>`, since splits may use the same names."""
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
    for path in (path for pattern in TABLE_FILES for path in _files(folder, pattern)):
        found.problems.append(f"{quote(path.name)} is not read: its first line names no image and caption columns")
    return Listing(folder, split, found, FolderImages(root), sha256(os.fsencode(name) for name in names))


LAYOUTS = (
    DatasetLayout(Entities.needs, Entities.recognises, Entities),
    DatasetLayout(
        "captions.txt, results.csv, *.token, dataset_*.json or labels.jsonl with the images they list",
        lambda folder: bool(listings_of(folder)),
        _open_listing,
    ),
    DatasetLayout(
        "Parquet files, or a folder of save_to_disk of the library datasets",
        huggingface.recognises,
        huggingface.open_local,
    ),
    DatasetLayout(
        "one CSV, TSV or JSONL file with columns for image and caption",
        lambda folder: bool(tables_of(folder)),
        _open_table,
    ),
    DatasetLayout("<split>/labels.jsonl", lambda folder: bool(_labels(folder)), _open_labels),
    DatasetLayout("images alone", has_images, _open_images, captions=False),
)
NEEDS = "; or ".join(layout.needs for layout in LAYOUTS)
