"""Reading order: compare the order of generated tokens with the order of their peaks on the line."""

from __future__ import annotations

import unicodedata

from grounding.explanation.explanation import Explanation
from grounding.explanation.labels import is_blank
from grounding.explanation.maps import peak_cell


def token_indices(explanation: Explanation) -> tuple[int, ...]:
    """Indices of the tokens among the entries, in reading order."""
    return tuple(i for i, entry in enumerate(explanation.entries) if entry.kind == "token")


def right_to_left(text: str) -> bool:
    """Whether most letters of `text` belong to right-to-left scripts."""
    directions = [unicodedata.bidirectional(c) for c in text]
    backward = sum(d in ("R", "AL") for d in directions)
    return backward > sum(d == "L" for d in directions)


def peak_cell_of(explanation: Explanation, entry: int, key: str) -> tuple[int, int] | None:
    """(row, column) of an entry's strongest seen patch by method `key`; None for a map without evidence."""
    patch_map = explanation.map(entry, key)
    return peak_cell(patch_map.raw, explanation.geometry.seen_cells) if patch_map.status else None


def reading_order(explanation: Explanation, key: str) -> tuple[int, ...]:
    """Indices of the entries of tokens whose peak by method `key` is behind the peaks of earlier tokens.

    "Behind" is more than one patch column to the left of the furthest peak of the earlier tokens, or to the right of it
    in a right-to-left text. Intended for a text on one line. Blank tokens, maps without evidence and shared maps are
    ignored. Raises GroundingError for an unknown method.
    """
    sign = -1 if right_to_left(explanation.caption) else 1
    furthest, back = None, []
    for entry in token_indices(explanation):
        cell = peak_cell_of(explanation, entry, key)
        if cell is None or explanation.methods[key].shared or is_blank(explanation.entries[entry].label):
            continue
        column = sign * cell[1]
        if furthest is not None and column < furthest - 1:
            back.append(entry)
        furthest = column if furthest is None else max(furthest, column)
    return tuple(back)
