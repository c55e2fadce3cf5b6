"""Find the image folder of a data set, and resolve image paths that must not leave it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from grounding.core.errors import DataError
from grounding.core.printable import quote

# Names in published copies; the nested one first: its outer folder contains nothing else.
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
# Number of listed names that are looked up to find their folder.
TRIED = 8


def image_root(folder: Path, names: Iterable[str]) -> Path:
    """Return the absolute path of the folder that contains images with these names.

    It is one of FOLDERS in `folder`, `folder`, or another folder in it. Only the first few names are looked up. If none
    is found, it is the first of FOLDERS that exists, else `folder`.
    """
    folder = folder.absolute()
    usual = [folder / name for name in FOLDERS if (folder / name).is_dir()]
    first = list(islice(names, TRIED))
    others = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for root in (*usual, folder, *others):
        if any(_is_file_in(root, name) for name in first):
            return root
    return (*usual, folder)[0]


def has_images(folder: Path) -> bool:
    """Whether a folder, or one of FOLDERS in it, contains files with the suffix of an image."""
    return bool(images_of(folder)[1])


def images_of(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Return (root, sorted names) of the images in a folder, or in one of FOLDERS in it."""
    names = sorted(_images_in(folder))
    if names:
        return folder.absolute(), tuple(names)
    root = image_root(folder, ())
    return root, tuple(sorted(_images_in(root)))


def image_path(root: Path, name: str) -> Path:
    """Return the path of an image below `root`, which may not exist.

    Raises DataError, without opening a file, for a path outside of `root` (links are followed) and for invalid names.
    """
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{quote(name)} cannot be an image's name ({error})") from None
    if not inside:
        raise DataError(f"{quote(path)}: is outside of {quote(root)} and is not opened")
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
