"""Labels along a line: as near as possible to where they belong, none over another. Lengths in any one unit."""

from __future__ import annotations

from collections.abc import Sequence

GAP = 0.05


def spread(
    wishes: Sequence[float], widths: Sequence[float], low: float, high: float, rows: int = 1
) -> list[float] | None:
    """Centres of labels `widths` wide between `low` and `high`, near their `wishes` (ascending); None: no room.

    Label i stands in row i % rows. A vertical line rises from each label: it touches no label of the rows above.
    """
    if not wishes:
        return []
    needed = _needed(widths, rows)
    first = [low + width / 2 for width in widths]
    last = [high - width / 2 for width in widths]
    if any(f > t + 1e-9 for f, t in zip(_pushed(first, first, needed), last, strict=True)):
        return None
    # Both are feasible, so is their middle, and it leans to neither side.
    right = _held(_pushed(wishes, first, needed), last, needed)
    left = _pushed(_held(wishes, last, needed), first, needed)
    return [(a + b) / 2 for a, b in zip(right, left, strict=True)]


def extent(widths: Sequence[float], rows: int = 1) -> float:
    """The room that labels take which stand as close as they can."""
    if not widths:
        return 0.0
    first = [width / 2 for width in widths]
    return max(c + w / 2 for c, w in zip(_pushed(first, first, _needed(widths, rows)), widths, strict=True))


def _needed(widths: Sequence[float], rows: int) -> list[list[float]]:
    """Of each label the distances that the next ones must keep from it."""
    count = len(widths)
    return [[_distance(widths, i, j, rows) for j in range(i + 1, min(count, i + rows + 1))] for i in range(count)]


def _distance(widths: Sequence[float], i: int, j: int, rows: int) -> float:
    """Between the centres of labels i < j: of one row by both widths, else the upper one by its own."""
    if (j - i) % rows == 0:
        return (widths[i] + widths[j]) / 2 + GAP
    upper = i if i % rows < j % rows else j
    return widths[upper] / 2 + GAP


def _pushed(wishes: Sequence[float], first: Sequence[float], needed: Sequence[Sequence[float]]) -> list[float]:
    """From left to right: each where it would be, or as far to the right as those before it push it."""
    made = [max(wish, start) for wish, start in zip(wishes, first, strict=True)]
    for i, distances in enumerate(needed):
        for step, distance in enumerate(distances, 1):
            made[i + step] = max(made[i + step], made[i] + distance)
    return made


def _held(wishes: Sequence[float], last: Sequence[float], needed: Sequence[Sequence[float]]) -> list[float]:
    """From right to left: each where it would be, or as far to the left as those behind it push it."""
    made = [min(wish, end) for wish, end in zip(wishes, last, strict=True)]
    for i in range(len(made) - 1, -1, -1):
        for step, distance in enumerate(needed[i], 1):
            made[i] = min(made[i], made[i + step] - distance)
    return made
