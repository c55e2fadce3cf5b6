"""How large the panels of a figure are, and how many stand side by side."""

from __future__ import annotations

from math import ceil, sqrt

from grounding.explanation.figures.sheet import Grid

BROADEST = 16.0  # inches of a sheet
FLAT = 3.5  # width : height from which a picture is a line, to be read from left to right
NARROWEST_LINE = 3.2  # inches
# Inches that a line is high, where there is room: less where there are many panels.
LINE_DEPTHS = ((24, 0.6), (160, 0.45))
LEAST_DEPTH = 0.35
# A line may be a little smaller so that one more fits beside it, or larger where there is room.
SLACK, STRETCHED = 0.9, 1.25


def panel_grid(ratio: float, columns: int, rows: int, *, together: bool = False) -> Grid:
    """The columns of a sheet for `rows` x `columns` panels of pictures with this width : height.

    The grid has fewer columns than asked for where the panels are lines that would be too small to read beside each
    other; with `together`, all of them or one.
    """
    if ratio >= FLAT:
        return _lines(ratio, columns, rows, together)
    # Square inches of a panel: smaller where there are many.
    area = 4.6 if rows <= 4 and columns <= 4 else 3.4 if rows <= 10 else 2.6
    width = min(sqrt(area * ratio), 4.6, 3.8 * ratio)
    return Grid((width, width / ratio), columns)


def _lines(ratio: float, columns: int, rows: int, together: bool) -> Grid:
    plain = Grid((1.0, 1.0), 1)
    usable = BROADEST - 2 * plain.margin - plain.width(0)
    depth = next((d for most, d in LINE_DEPTHS if rows * columns <= most), LEAST_DEPTH)
    wish = max(NARROWEST_LINE, depth * ratio)
    fitting = [n for n in range(1, columns + 1) if usable / n - plain.gap >= SLACK * wish]
    most = max(fitting, default=1)
    # Four panels of which three fit stand in two pairs.
    count = most if most == columns else 1 if together else ceil(columns / ceil(columns / most))
    width = min(usable / count - plain.gap, STRETCHED * wish)
    return Grid((width, width / ratio), count)
