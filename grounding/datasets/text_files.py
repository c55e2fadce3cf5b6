"""Reading text files whole: UTF-8 with or without a byte order mark, and one line for what is not."""

from __future__ import annotations

from pathlib import Path

from grounding.core.errors import DataError
from grounding.core.printable import quote


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file. Raises DataError."""
    try:
        # A FIFO would wait for a writer that may never come.
        if not path.is_file():
            raise DataError(f"{quote(path)}: there is no such file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{quote(path)}: {error.strerror or error}") from None


def decoded(data: bytes, path: Path) -> str:
    """The text of a file's bytes, without the byte order mark. Raises DataError where they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{quote(path)} is not UTF-8 (byte {error.start})") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends (LF or CR LF)."""
    # Not splitlines(): a caption may hold U+2028 and its like.
    return [line.rstrip("\r") for line in text.split("\n")]


def read_lines(path: Path) -> list[str]:
    """The lines of a file. Raises DataError."""
    return lines_of(decoded(read_bytes(path), path))
