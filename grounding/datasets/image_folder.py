"""Where the pictures of a data set lie, and the path of one of them that never leaves that folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from grounding.core.errors import DataError
from grounding.core.printable import quote

# As the copies in circulation name it; the nested one first, its outer folder holds nothing else.
FOLDERS = (
    "flickr30k_images/flickr30k_images",
    "flickr30k-images/flickr30k-images",
    "Images",
    "images",
    "flickr30k_images",
    "flickr30k-images",
    "Flicker8k_Dataset",
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ALL_SUFFIXES = (*SUFFIXES, ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2", ".tga", ".ico")
# So many names of a listing are tried to find out which folder they lie in.
TRIED = 8


def image_root(folder: Path, names: Iterable[str]) -> Path:
    """The folder, an absolute path, in which pictures with these names lie: `folder` or a usual one inside it.

    Only the first few names are looked up, last in whatever other folders there are. Where none is found: the first
    usual folder that there is, else `folder`.
    """
    folder = folder.absolute()
    usual = [folder / name for name in FOLDERS if (folder / name).is_dir()]
    first = list(islice(names, TRIED))
    others = sorted(place for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    for place in (*usual, folder, *others):
        if any(_is_file_in(place, name) for name in first):
            return place
    return (*usual, folder)[0]


def has_images(folder: Path) -> bool:
    """Whether a folder, or a usual one inside it, holds a file that its name calls a picture."""
    return bool(images_of(folder)[1])


def images_of(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """(root, names) of the pictures in a folder, or in a usual one inside it; sorted, other folders not entered."""
    names = sorted(_images_in(folder))
    if names:
        return folder.absolute(), tuple(names)
    root = image_root(folder, ())
    return root, tuple(sorted(_images_in(root)))


def image_path(root: Path, name: str) -> Path:
    """The path of a picture below `root`, whether it is there or not.

    Raises DataError, without opening anything, for a name that leads elsewhere, links followed, and for no name at all.
    """
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{quote(name)} cannot be a picture's name ({error})") from None
    if not inside:
        raise DataError(f"{quote(path)}: lies outside of {quote(root)} and is not opened")
    return path


def _images_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [e.name for e in entries if e.name.lower().endswith(ALL_SUFFIXES) and not e.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{quote(folder)}: {error.strerror or error}") from None


def _is_file_in(root: Path, name: str) -> bool:
    try:
        # Not Path.is_file: it raises for names that are too long.
        return bool(name) and os.path.isfile(image_path(root, name))  # noqa: PTH113
    except DataError:
        return False
