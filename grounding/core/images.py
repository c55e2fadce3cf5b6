"""Open images from paths, addresses, arrays and file objects as upright RGB `Picture`s; errors are one line."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from grounding.core.errors import CropError, ImageError
from grounding.core.image_decoding import BROKEN, MAX_PIXELS, check_size, decode, upright_rgb
from grounding.core.printable import one_line, quote

__all__ = ["MAX_BYTES", "MAX_PIXELS", "ImageError", "Picture", "open_image"]

MAX_BYTES = 512 * 2**20
MAX_URL_BYTES = 32 * 2**20
URL_SECONDS = 30.0
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright RGB image and its source.

    Attributes
    ----------
    pil: PIL image of mode RGB, width x height pixels, EXIF orientation applied.
    path: path or address as given; None for images from memory.
    sha256: of the file's bytes, or of size and decoded pixels where there is no file.
    warnings: frames that were ignored, a range that was guessed, and the like.
    crop: (x0, y0, x1, y1) of this part in the upright image of the file, its pixels, half-open; None: the whole image.
    """

    pil: Image.Image
    width: int
    height: int
    path: str | None
    sha256: str
    warnings: tuple[str, ...] = ()
    crop: tuple[int, int, int, int] | None = None

    def cropped(self, crop: Sequence[int]) -> Picture:
        """Return a part of this image, (x0, y0, x1, y1) in its pixels, half-open, as an image of its own.

        Raises CropError for a part that is empty or extends beyond the image.
        """
        x0, y0, x1, y1 = crop
        if not (0 <= x0 < x1 <= self.width and 0 <= y0 < y1 <= self.height):
            name = f"{quote(self.path)}: " if self.path else ""
            raise CropError(
                f"{name}crop {x0},{y0},{x1},{y1} is not a part of the image of {self.width} x {self.height} pixels: "
                f"give x0,y0,x1,y1 with 0 <= x0 < x1 <= {self.width} and 0 <= y0 < y1 <= {self.height}",
                "failed_input",
            )
        note = f"cropped to {x0},{y0},{x1},{y1} of {self.width} x {self.height} pixels; positions are those of the crop"
        image = self.pil.crop((x0, y0, x1, y1))
        return replace(
            self, pil=image, width=x1 - x0, height=y1 - y0, warnings=(*self.warnings, note), crop=(x0, y0, x1, y1)
        )


def open_image(
    source: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    root: str | Path | None = None,
    allow_url: bool = False,
    crop: Sequence[int] | None = None,
) -> Picture:
    """Open an image.

    Parameters
    ----------
    source: a path, a PIL image, a uint8 array (H, W), (H, W, 3) or (H, W, 4), a binary file object, an opened
        `Picture`, or an http(s) address where `allow_url` is set.
    max_pixels: larger images raise ImageError from their header, before decoding.
    root: a folder that paths must stay in, links followed; relative paths start there. For lists from elsewhere.
    allow_url: fetch addresses, up to 32 MB and 30 seconds each.
    crop: the part to use, (x0, y0, x1, y1) in pixels of the upright image, half-open (see `Picture.cropped`).

    Raises ImageError, one line, with `status`: `failed_read` (missing, unreadable, no regular file, network),
    `failed_decode` (empty, truncated, unknown format), `failed_input` (outside `root`, address not allowed, over
    `max_pixels`, no image at all). Safe in threads; no process-wide flag is changed.
    """
    image = _open(source, max_pixels, root, allow_url)
    return image if crop is None else image.cropped(crop)


def _open(source: Any, max_pixels: int, root: str | Path | None, allow_url: bool) -> Picture:
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        return _from_pil(source, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_pil(_from_array(source), max_pixels)
    if isinstance(source, str) and ADDRESS.match(source):
        return _from_bytes(_fetch(source, allow_url), source, max_pixels)
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        return _from_bytes(_read_path(path, root), path, max_pixels)
    if hasattr(source, "read"):
        return _from_bytes(_read_file(source), None, max_pixels)
    raise ImageError(
        f"an image must be a path, a PIL image, a uint8 array or a file object, not {type(source).__name__}",
        "failed_input",
    )


def _from_bytes(data: bytes, path: str | None, max_pixels: int) -> Picture:
    name = "file object" if path is None else quote(path)
    image, warnings = decode(data, name, max_pixels)
    return Picture(image, *image.size, path, hashlib.sha256(data).hexdigest(), warnings)


# ---------------------------------------------------------------- memory


def _from_pil(source: Image.Image, max_pixels: int) -> Picture:
    name = "PIL image"
    check_size(source, name, max_pixels)
    try:
        source.load()
    except BROKEN as error:
        raise ImageError(f"{name}: the image cannot be decoded ({error})", "failed_decode") from None
    image, warnings = upright_rgb(source, name)
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes())
    return Picture(image, *image.size, None, digest.hexdigest(), warnings)


def _from_array(array: np.ndarray) -> Image.Image:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not fits or array.dtype != np.uint8 or 0 in array.shape:
        raise ImageError(
            f"an array must be uint8 of shape (H, W), (H, W, 3) or (H, W, 4), not {array.dtype} {array.shape}",
            "failed_input",
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _read_file(source: Any) -> bytes:
    try:
        data = source.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"file object: cannot be read ({error})", "failed_read") from None
    if not isinstance(data, bytes | bytearray):
        raise ImageError("file object: opened as text; open it in binary mode", "failed_input")
    return _limited(bytes(data), "file object", MAX_BYTES)


def _limited(data: bytes, name: str, limit: int) -> bytes:
    if len(data) > limit:
        raise ImageError(f"{name}: more than {limit} bytes", "failed_input")
    return data


# ---------------------------------------------------------------- files


def _read_path(path: str, root: str | Path | None) -> bytes:
    name = quote(path)
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    # A FIFO opened without this waits for a writer that may never come.
    flags |= getattr(os, "O_NONBLOCK", 0)
    try:
        if root is not None:
            path = _within(path, Path(root), name)
            # No link is left in a resolved path; one that appears now was put there in between.
            flags |= getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            _check_regular(os.fstat(file.fileno()).st_mode, name)
            return _limited(file.read(MAX_BYTES + 1), name, MAX_BYTES)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: {_why(error)}", "failed_read") from None


def _within(path: str, root: Path, name: str) -> str:
    """Return the resolved path if it is inside `root` after following all links. Opens nothing."""
    try:
        base = root.resolve()
        resolved = (base / path).resolve()
    except RuntimeError:
        raise ImageError(f"{name}: its links form a loop", "failed_read") from None
    if not resolved.is_relative_to(base):
        raise ImageError(f"{name}: is outside of {quote(root)} and is not opened", "failed_input")
    return str(resolved)


def _check_regular(mode: int, name: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    raise ImageError(f"{name}: {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file", "failed_read")


def _why(error: Exception) -> str:
    number = getattr(error, "errno", None)
    known = {errno.ENOENT: "there is no such file", errno.EACCES: "the file may not be read (permission denied)"}
    if number in known:
        return known[number]
    return getattr(error, "strerror", None) or one_line(error)


# ---------------------------------------------------------------- network


def _fetch(address: str, allowed: bool) -> bytes:
    name = quote(address)
    if not address.lower().startswith(("http://", "https://")):
        raise ImageError(f"{name}: only http and https addresses can be fetched", "failed_input")
    if not allowed:
        raise ImageError(f"{name}: images are not fetched from the network unless allow_url is set", "failed_input")
    try:
        return _limited(_download(address), name, MAX_URL_BYTES)
    except ImageError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"{name}: the server answers {error.code} {quote(error.reason)}", "failed_read") from None
    except TimeoutError:
        raise ImageError(f"{name}: no whole image within {URL_SECONDS:g} seconds", "failed_read") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageError(f"{name}: cannot be fetched ({' '.join(str(error).split())})", "failed_read") from None


def _download(address: str) -> bytes:
    """Return at most one byte more than the limit. Raises TimeoutError when the whole takes too long."""
    deadline = time.monotonic() + URL_SECONDS
    request = urllib.request.Request(address, headers={"User-Agent": "grounding"})
    data = bytearray()
    with urllib.request.urlopen(request, timeout=URL_SECONDS) as answer:
        while len(data) <= MAX_URL_BYTES:
            part = answer.read1(65536)
            if not part:
                break
            data += part
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(data)
