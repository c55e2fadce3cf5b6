"""Whether a text was read along the line: the order of the tokens against the order of their peaks."""

from __future__ import annotations

import unicodedata

from grounding.explanation.explanation import Explanation
from grounding.explanation.labels import is_blank
from grounding.explanation.maps import peak_cell


def token_indices(explanation: Explanation) -> tuple[int, ...]:
    """Places of the tokens among the entries, in reading order."""
    return tuple(i for i, entry in enumerate(explanation.entries) if entry.kind == "token")


def right_to_left(text: str) -> bool:
    """Whether most letters of `text` belong to scripts that are written from right to left."""
    directions = [unicodedata.bidirectional(c) for c in text]
    backward = sum(d in ("R", "AL") for d in directions)
    return backward > sum(d == "L" for d in directions)


def peak_cell_of(explanation: Explanation, entry: int, key: str) -> tuple[int, int] | None:
    """(row, column) of an entry's strongest seen patch by method `key`; None for a map without evidence."""
    found = explanation.map(entry, key)
    return peak_cell(found.raw, explanation.geometry.seen_cells) if found.status else None


def reading_order(explanation: Explanation, key: str) -> tuple[int, ...]:
    """Entries (their places in `entries`) of tokens that method `key` sees where the text was read before.

    That is: more than one patch column to the left of the furthest peak of the tokens before it; to the right of it
    in a text that runs from right to left. Meant for a text on one line. Blank tokens, maps without evidence and maps
    that are one for all entries are left out. Raises GroundingError for a method that is not there.
    """
    sign = -1 if right_to_left(explanation.caption) else 1
    furthest, back = None, []
    for entry in token_indices(explanation):
        cell = peak_cell_of(explanation, entry, key)
        if cell is None or explanation.methods[key].shared or is_blank(explanation.entries[entry].label):
            continue
        place = sign * cell[1]
        if furthest is not None and place < furthest - 1:
            back.append(entry)
        furthest = place if furthest is None else max(furthest, place)
    return tuple(back)
