"""Read text files as UTF-8, with or without a byte order mark, and split them into lines."""

from __future__ import annotations

from pathlib import Path

from grounding.core.errors import DataError
from grounding.core.printable import quote

# Name of a file with one JSON object per image.
LABELS = "labels.jsonl"


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file. Raises DataError."""
    try:
        # Reading a FIFO would block.
        if not path.is_file():
            raise DataError(f"{quote(path)}: there is no such file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{quote(path)}: {error.strerror or error}") from None


def decoded(data: bytes, path: Path) -> str:
    """Decode the bytes of a file, without the byte order mark. Raises DataError if they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{quote(path)} is not UTF-8 (byte {error.start})") from None


def lines_of(text: str) -> list[str]:
    """Split a text into lines, without line ends (LF or CR LF)."""
    # Not splitlines(): captions may contain U+2028 and other separators.
    return [line.rstrip("\r") for line in text.split("\n")]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file. Raises DataError."""
    return lines_of(decoded(read_bytes(path), path))
