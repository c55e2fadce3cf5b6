"""Placement of labels along a line: near their preferred positions and without overlap. Lengths in any one unit."""

from __future__ import annotations

from collections.abc import Sequence

GAP = 0.05


def spread(
    wishes: Sequence[float], widths: Sequence[float], low: float, high: float, rows: int = 1
) -> list[float] | None:
    """Centres of labels `widths` wide between `low` and `high`, near their `wishes` (ascending); None if too narrow.

    Label i is in row i % rows. A vertical line rises from each label and touches no label of the rows above.
    """
    if not wishes:
        return []
    needed = _needed(widths, rows)
    first = [low + width / 2 for width in widths]
    last = [high - width / 2 for width in widths]
    if any(f > t + 1e-9 for f, t in zip(_pushed(first, first, needed), last, strict=True)):
        return None
    # Both solutions are feasible, and so is their mean, which is biased to neither side.
    right = _held(_pushed(wishes, first, needed), last, needed)
    left = _pushed(_held(wishes, last, needed), first, needed)
    return [(a + b) / 2 for a, b in zip(right, left, strict=True)]


def extent(widths: Sequence[float], rows: int = 1) -> float:
    """Width of the labels at their minimal distances."""
    if not widths:
        return 0.0
    first = [width / 2 for width in widths]
    return max(c + w / 2 for c, w in zip(_pushed(first, first, _needed(widths, rows)), widths, strict=True))


def _needed(widths: Sequence[float], rows: int) -> list[list[float]]:
    """For each label, the minimal distances of the next labels."""
    count = len(widths)
    return [[_distance(widths, i, j, rows) for j in range(i + 1, min(count, i + rows + 1))] for i in range(count)]


def _distance(widths: Sequence[float], i: int, j: int, rows: int) -> float:
    """Minimal distance between the centres of labels i < j: both widths in one row, else by the upper one."""
    if (j - i) % rows == 0:
        return (widths[i] + widths[j]) / 2 + GAP
    upper = i if i % rows < j % rows else j
    return widths[upper] / 2 + GAP


def _pushed(wishes: Sequence[float], first: Sequence[float], needed: Sequence[Sequence[float]]) -> list[float]:
    """From left to right: each label at its preferred position, or further right, as far as those before require."""
    made = [max(wish, start) for wish, start in zip(wishes, first, strict=True)]
    for i, distances in enumerate(needed):
        for step, distance in enumerate(distances, 1):
            made[i + step] = max(made[i + step], made[i] + distance)
    return made


def _held(wishes: Sequence[float], last: Sequence[float], needed: Sequence[Sequence[float]]) -> list[float]:
    """From right to left: each label at its preferred position, or further left, as far as those after require."""
    made = [min(wish, end) for wish, end in zip(wishes, last, strict=True)]
    for i in range(len(made) - 1, -1, -1):
        for step, distance in enumerate(needed[i], 1):
            made[i] = min(made[i], made[i + step] - distance)
    return made
