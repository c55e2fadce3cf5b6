"""Fonts of figures: drawable characters, text width and line breaks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

from grounding.core.printable import escape

# Comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew and many symbols look the same on every machine.
OWN = "DejaVu Sans"
# Fallbacks, in this order, for characters that OWN lacks, where they are installed.
OTHERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil",
    "Noto Sans Thai", "Noto Sans Symbols 2", "Noto Sans Symbols2", "Noto Emoji", "Segoe UI Symbol", "Segoe UI Emoji",
    "Symbola", "Arial Unicode MS", "Unifont",
)  # fmt: skip
LINE = 1.28
LONGEST = 4000
# Hinting makes text wider at low resolution, so widths are measured at the resolution of figures.
RULER_DPI = 150
ELLIPSIS = "…"


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    names = {entry.name for entry in font_manager.fontManager.ttflist}
    return (OWN, *(name for name in OTHERS if name in names))


@lru_cache(maxsize=64)
def _glyphs(family: str, weight: str) -> frozenset[int]:
    path = font_manager.findfont(FontProperties(family=[family], weight=weight))
    return frozenset(font_manager.get_font(path).get_charmap())


def _family_of(character: str, weight: str) -> str | None:
    return next((name for name in _installed() if ord(character) in _glyphs(name, weight)), None)


def families(text: str, weight: str = "normal") -> list[str]:
    """Font families that together draw `text`, OWN first."""
    needed = {_family_of(c, weight) for c in set(text)}
    return [name for name in _installed() if name == OWN or name in needed]


def printable(text: str, weight: str = "normal") -> str:
    r"""`text` on one line; characters that no installed font can draw are escaped (`\u732b`)."""
    shown = escape(text)
    if shown.isascii():
        return shown
    known = {c: _family_of(c, weight) is not None for c in set(shown)}
    return "".join(c if known[c] else c.encode("unicode_escape").decode() for c in shown)


@lru_cache(maxsize=1)
def _ruler() -> RendererAgg:
    return RendererAgg(1, 1, RULER_DPI)


@lru_cache(maxsize=4096)
def width_of(text: str, size: float, weight: str = "normal") -> float:
    """Width of one line, inches; `size` in points."""
    font = FontProperties(family=families(text, weight), size=size, weight=weight)
    return float(_ruler().get_text_width_height_descent(text, font, False)[0]) / RULER_DPI


def wrap(
    text: str, width: float, size: float, weight: str = "normal", lines: int | None = None, ending: str = ELLIPSIS
) -> list[str]:
    """`text`, made printable, in lines of at most `width` inches; after `lines` lines it is cut and gets `ending`."""
    shown = printable(text[:LONGEST] + (ELLIPSIS if len(text) > LONGEST else ""), weight)
    made: list[str] = []
    for line in _lines(shown.split(), width, size, weight):
        if lines is not None and len(made) == lines:
            last = made[-1]
            while last and width_of(last + ending, size, weight) > width:
                last = last[:-1]
            made[-1] = last.rstrip() + ending
            break
        made.append(line)
    return made


def _lines(words: list[str], width: float, size: float, weight: str) -> Iterator[str]:
    line = ""
    for whole in words:
        word = whole
        joined = f"{line} {word}" if line else word
        if width_of(joined, size, weight) <= width:
            line = joined
            continue
        if line:
            yield line
        while width_of(word, size, weight) > width and len(word) > 1:
            cut = _longest_prefix(word, width, size, weight)
            yield word[:cut]
            word = word[cut:]
        line = word
    if line:
        yield line


def _longest_prefix(word: str, width: float, size: float, weight: str) -> int:
    """Number of characters (at least one) that fit on a line, of a word too long for it."""
    low, high = 1, len(word) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width_of(word[:middle], size, weight) <= width else (low, middle - 1)
    # A path breaks after a separator and an escape before its backslash, unless that leaves less than half a line.
    sign = max(word.rfind("\\", 0, low + 1), 1 + max(word.rfind(c, 0, low) for c in "./_-"))
    return sign if sign > low / 2 else low


def height_of(lines: int, size: float) -> float:
    """Height of `lines` lines in inches; `size` in points."""
    return lines * size * LINE / 72
