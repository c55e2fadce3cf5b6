"""Tables of the library `datasets`: Parquet files, folders of `save_to_disk`, and data sets on the Hugging Face hub.

Images stay encoded: a record has the bytes of the table. If a table has a column `split`, it decides, whatever the name
of the split that contains the row. Code of a data set is never run.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.core.errors import DataError
from grounding.core.hub import hub_answers, quiet
from grounding.core.printable import one_line, quote
from grounding.datasets.caption_files import CAPTION_COLUMNS, captions_of
from grounding.datasets.caption_lists import ListedRow, Listing, ParsedListing, sha256
from grounding.datasets.image_folder import image_path

PREFIX = "hf:"
# `owner/name`, or with a revision `owner/name@refs/convert/parquet`.
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\S+))?")
SAVED_FILES = ("dataset_dict.json", "state.json")
IMAGE_COLUMNS = ("image", "img", "picture")
ID_COLUMNS = ("filename", "file_name", "img_id", "image_id")
# `test-00000-of-00009.parquet`
SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}(-\w+)?")
FILE_SPLITS = ("train", "val", "validation", "dev", "test")
UNNAMED_SPLIT = "rows"

NO_SCRIPTS = "Dataset scripts are no longer supported"


def recognises(path: Path) -> bool:
    """Whether a path is a table: a `.parquet` file, or a folder of them or of `save_to_disk`."""
    if path.is_file():
        return path.suffix == ".parquet"
    return any((path / name).is_file() for name in SAVED_FILES) or bool(_parquet(path))


def open_local(path: Path, split: str | None) -> Listing:
    """Open a split of a local table (None: all). Raises DataError.

    `datasets` copies Parquet files once to its cache (HF_DATASETS_CACHE), from which rows are read in any order.
    """
    home = path if path.is_dir() else path.parent
    with _as_data_error(quote(path)):
        import datasets

        if any((path / name).is_file() for name in SAVED_FILES):
            tables = datasets.load_from_disk(str(path))
            tables = tables if isinstance(tables, dict) else {"": tables}
        else:
            files = _by_split([path] if path.is_file() else _parquet(path))
            # The library requires a name for a split.
            named = {split or UNNAMED_SPLIT: [glob.escape(str(file)) for file in own] for split, own in files.items()}
            tables = datasets.load_dataset("parquet", data_files=named)
            tables = {split: tables[split or UNNAMED_SPLIT] for split in files}
        return _listing(tables, path, home.absolute(), split)


def _parquet(folder: Path) -> list[Path]:
    """Return the Parquet files of a folder, or of `data/` in it; deeper ones may belong to another data set."""
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))


def _by_split(paths: list[Path]) -> dict[str, list[Path]]:
    """Group Parquet files by the split in their names; the empty name for those without one."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        shard = SHARD.fullmatch(path.stem)
        found.setdefault(shard[1] if shard else path.stem if path.stem in FILE_SPLITS else "", []).append(path)
    # In the order of the library, not of the alphabet.
    return dict(sorted(found.items(), key=lambda item: (*FILE_SPLITS, item[0]).index(item[0])))


def open_hub(name: str, split: str | None) -> Listing:
    """Open a split (None: all) of a data set on the hub, `owner/name` or `owner/name@revision`. Raises DataError.

    If the hub does not answer, only data sets in the cache of `datasets` can be opened.
    """
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"{quote(name)} is no name on the hub: expected {PREFIX}owner/name or {PREFIX}owner/name@revision"
        )
    with _as_data_error(f"data set {quote(name)}"), _no_waiting():
        import datasets

        tables = datasets.load_dataset(match[1], revision=match[2])
        return _listing(tables, Path(f"{PREFIX}{name}"), None, split)


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class TableImages:
    """Images in a column of tables; `rows` maps a name to its table and row.

    `home` is the folder of images that are only paths in the table; `root` is the same, or None if the tables contain
    the images.
    """

    rows: Mapping[str, tuple[Any, int]]
    column: str
    home: Path | None
    root: Path | None

    def image(self, name: str) -> Path | bytes:
        """Return the bytes of an image, or its path below `home`. Raises DataError if there is neither."""
        table, row = self.rows[name]
        try:
            cell = table[row][self.column] or {}
        except (OSError, ValueError) as error:  # the table was truncated or removed meanwhile
            raise DataError(f"the image {quote(name)} cannot be read from its table ({one_line(error)})") from None
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise DataError(f"{quote(name)} has no image in its table")
        if self.home is None:
            raise DataError(f"{quote(name)} has no image in its table, only the path {quote(cell['path'])}")
        return image_path(self.home, cell["path"])


def _listing(tables: Mapping[str, Any], folder: Path, home: Path | None, split: str | None) -> Listing:
    found, root = ParsedListing("datasets"), None
    rows: dict[str, tuple[Any, int]] = {}
    for key, table in tables.items():
        column = _image_column(table)
        images = _encoded(table, column)
        if len(table) and (images[0][column] or {}).get("bytes") is None:
            root = home
        entries = _entries(table, key, len(tables) > 1)
        found.entries += entries
        for row, entry in enumerate(entries):
            rows.setdefault(entry.image, (images, row))
        if _first(table, CAPTION_COLUMNS) is None:
            found.problems.append(f"no captions: the columns are {', '.join(table.column_names)}")
    digest = sha256(json.dumps([e.image, e.split, e.texts], default=str).encode() for e in found.entries)
    return Listing(folder, split, found, TableImages(rows, column, home, root), digest)


def _entries(table: Any, key: str, several: bool) -> list[ListedRow]:
    caption, name, split = _first(table, CAPTION_COLUMNS), _first(table, ID_COLUMNS), _first(table, ("split",))
    kept = [part for part in (caption, name, split) if part]
    cells = table.select_columns(kept)[:] if kept else {}
    entries = []
    for row in range(len(table)):
        own = {part: cells[part][row] for part in kept}
        # Row numbers do not depend on the requested split.
        image = own[name] if name else f"{key}-{row}" if several else row
        texts = captions_of(own[caption]) if caption else ()
        whole = caption is None or isinstance(own[caption], list)
        place = f"{key} row {row}".strip()
        own_split = own[split] if split and own[split] else key
        entries.append(ListedRow(place, "" if image is None else str(image), texts, None, str(own_split), whole))
    return entries


def _image_column(table: Any) -> str:
    import datasets

    typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    column = next(iter(typed), None) or _first(table, IMAGE_COLUMNS)
    if column is None:
        raise DataError(f"it has no column of images (there are: {', '.join(table.column_names)})")
    return column


def _encoded(table: Any, column: str) -> Any:
    """Return the column of images, without decoding."""
    import datasets

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _first(table: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in table.column_names), None)


# ---------------------------------------------------------------- the library `datasets`


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside the block the hub client is off line if the hub does not answer: uncached data fails without retries."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _as_data_error(name: str) -> Iterator[None]:
    """Convert errors of the library to DataError; silence its log, and its progress bars unless on a terminal."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: the library datasets cannot be imported ({one_line(error)})") from None
    bars = datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with quiet("datasets", level=logging.CRITICAL):
            yield
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(("no split", name)) else f"{name}: {error}") from None
    except Exception as error:
        raise DataError(f"{name} cannot be opened: {_reason(error)}") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """Return the reason of an error; known ones in the words of the user."""
    text = one_line(error)
    if NO_SCRIPTS in text:
        return "it is a script, and scripts are not run; add @refs/convert/parquet for its Parquet revision"
    if "OfflineModeIsEnabled" in text or "LocalEntryNotFoundError" in text or "Couldn't reach" in text:
        return "no answer from the hub, and it is not in the cache"
    cause = error.__cause__
    return f"{text} ({one_line(cause)})" if cause is not None and one_line(cause) not in text else text
