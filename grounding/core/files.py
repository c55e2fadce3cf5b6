"""Atomic writes, ownership checks of output folders, and safe file names."""

from __future__ import annotations

import json
import os
import secrets
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from grounding.core.errors import OutputError
from grounding.core.printable import escape

# Every result file carries a mark of this package; only files with a mark are ever replaced or removed.
MARK = "grounding"
FORMAT = "grounding.explanation"
MARK_IN_ZIP = "schema_version.npy"
STAGING = ".grounding-"
# Part of the name of a file while it is written.
PART = ".tmp-"
NAME_BYTES = 64


def slug(text: str, fallback: str = "entry", longest: int = NAME_BYTES) -> str:
    """Return a file name made from any text: lower-case letters, digits, `_` and inner `-`; `fallback` if none remain.

    It has at most `longest` bytes of UTF-8, no path separator, and does not begin with `-` or `.`.
    """
    normal = unicodedata.normalize("NFC", text).lower()
    kept = "".join(c if c.isalnum() or c == "-" or unicodedata.category(c)[0] == "M" else "_" for c in normal)
    words = [word for word in kept.split("_") if word.strip("-")]
    whole = "_".join(words).encode("utf-8", "ignore")[:longest]
    return whole.decode("utf-8", "ignore").strip("_-") or fallback


def check_output(directory: str | Path, names: tuple[str, ...]) -> Path:
    """Return the folder if result files called `names` can be written to it.

    It may be missing, empty, or contain results of this package. Nothing is changed. Raises OutputError (a
    GroundingError and an OSError) with the reason.
    """
    folder = Path(directory)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # raises for names that no file can have
        if os.path.lexists(folder) and not folder.is_dir():
            raise OutputError(f"{escape(folder)} is a file, not a folder; choose another --output")
        if folder.is_dir():
            _check_ours(folder, names)
        try_writing(folder)
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write into {escape(folder)}: {reason}") from None
    return folder


def _check_ours(folder: Path, names: tuple[str, ...]) -> None:
    found = [entry for entry in folder.iterdir() if not entry.name.startswith(STAGING)]
    present = [entry for entry in found if entry.name in names]
    foreign = next((entry for entry in present if not is_ours(entry)), None)
    if foreign is not None:
        raise OutputError(f"{escape(foreign)} was not written by grounding and is not replaced; choose another folder")
    if found and not present:
        raise OutputError(f"{escape(folder)} holds other files and no results of grounding; choose another folder")


def try_writing(folder: Path) -> None:
    """Create and remove a folder in `folder` or in its nearest existing parent. Raises OSError.

    Permissions are no substitute for trying: disks may be read-only, quotas used up.
    """
    parent = folder
    while not parent.is_dir():
        if os.path.lexists(parent):
            raise OutputError(f"cannot write into {escape(folder)}: {escape(parent)} is a file, not a folder")
        parent = parent.parent
    trial = parent / (STAGING + secrets.token_hex(8))
    trial.mkdir()
    with suppress(FileNotFoundError):  # another process tidied up
        trial.rmdir()


def is_ours(path: Path) -> bool:
    """Return whether a file carries the mark of this package."""
    if path.is_symlink() or not path.is_file():
        return False
    # A file that cannot be parsed is not a result of this package.
    with suppress(OSError, ValueError, SyntaxError, RecursionError, zipfile.BadZipFile, Image.DecompressionBombError):
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            return isinstance(content, dict) and content.get("format") == FORMAT
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return MARK_IN_ZIP in archive.namelist()
        with Image.open(path) as image:
            return str(image.info.get("Software", "")).startswith(MARK)
    return False


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, in place of an earlier one: it is complete or unchanged after a crash. Raises OSError.

    The folder must exist. A killed process may leave `<name>.tmp-<digits>`.
    """
    part = path.with_name(f"{path.name}{PART}{secrets.token_hex(8)}")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    _sync_folder(path.parent)


def write_together(folder: Path, files: Mapping[str, bytes], known: tuple[str, ...]) -> None:
    """Write all `files` (name -> content) to `folder`, or change nothing. Raises OSError.

    Files of the names `known` that are not in `files` are removed. A new folder appears with all files in it. In an
    existing folder files are replaced one by one, the last of `files` last, and restored if anything fails.
    """
    if folder.is_dir():
        with _staging(folder) as stage:
            _fill(stage, files)
            _exchange(folder, stage, files, known)
        return
    with _parents(folder), _staging(folder.parent) as stage:
        fresh = stage / "new"
        fresh.mkdir()
        _fill(fresh, files)
        fresh.replace(folder)
        _sync_folder(folder.parent)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Create the missing parents of a folder; remove them again on failure."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    made: list[Path] = []
    try:
        for parent in reversed(missing):
            parent.mkdir()
            made.append(parent)
        yield
    except BaseException:
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """A temporary folder in `parent`, on the same disk as the results; removed afterwards, also on failure."""
    stage = parent / (STAGING + secrets.token_hex(8))
    try:
        stage.mkdir()
        yield stage
    finally:
        _remove(stage)


def _remove(stage: Path) -> None:
    """Remove a staging folder: at most two levels of plain files written by this module."""
    if not stage.is_dir():
        return
    for entry in stage.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            _remove(entry)
        else:
            entry.unlink()
    stage.rmdir()


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        with (folder / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync_folder(folder)


def _exchange(folder: Path, stage: Path, files: Mapping[str, bytes], known: tuple[str, ...]) -> None:
    """Replace the old files by those in `stage`, with a backup of all old files made before the first change."""
    old = stage / "old"
    old.mkdir()
    names = (*files, *(name for name in known if name not in files))
    _fill(old, {name: (folder / name).read_bytes() for name in names if (folder / name).exists()})
    try:
        for name in names:
            if name in files:
                (stage / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        _sync_folder(folder)
    except BaseException:
        for name in names:
            if (old / name).exists():
                (old / name).replace(folder / name)
            elif not (stage / name).exists():
                (folder / name).unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    # Some systems cannot sync a folder; the files themselves are safe by then.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
