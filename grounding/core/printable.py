"""Escape and quote text for one line of a message, a table or a terminal."""

from __future__ import annotations


def escape(value: object) -> str:
    """Return `value` as one line of text; control characters, bidirectional controls and line ends are escaped."""
    text = str(value)
    return "".join(c if c.isprintable() or c in "\u200d\ufe0f" else c.encode("unicode_escape").decode() for c in text)


def quote(value: object, limit: int = 200) -> str:
    """Return `value` in quotes, escaped as by `repr`; text of more than `limit` characters is cut in the middle."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return repr(text)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of an error on one line, at most `limit` characters; the type's name if it is empty."""
    return escape(" ".join(str(error).split()) or type(error).__name__)[:limit]
