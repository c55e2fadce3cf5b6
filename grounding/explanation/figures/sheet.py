"""A sheet of labelled panels as a matplotlib figure, without pyplot. Lengths are inches from the top left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from grounding.explanation.figures import fonts
from grounding.explanation.figures.pixels import Segment, Segments

DPI = fonts.RULER_DPI
# Agg cannot draw 2^16 pixels in a row; longer sheets get fewer pixels per inch.
MOST_PIXELS = 40_000

INK, QUIET, ALERT = "#1a1a1a", "#666666", "#a13d00"


@dataclass(frozen=True)
class Line:
    """A paragraph: wrapped to the width it is given, at most `most` lines of it. `size` in points."""

    text: str
    size: float = 7.0
    colour: str = QUIET
    weight: str = "normal"
    most: int | None = None
    space: float = 0.0  # inches above it
    ending: str = fonts.ELLIPSIS  # of a paragraph that is cut

    def wrapped(self, width: float) -> list[str]:
        """Its lines, `width` inches wide at most."""
        return fonts.wrap(self.text, width, self.size, self.weight, self.most, self.ending)


@dataclass(frozen=True)
class Bar:
    """A colour bar with a word at each end."""

    table: UInt8[np.ndarray, "256 3"]
    low: str
    high: str


Block = Sequence[Line | Bar]


@dataclass(frozen=True)
class Cell:
    """One panel: what stands above it, the panel, what stands below it. `name` finds its image in the figure (gid).

    `grid` are lines over it, as fractions of the panel: drawn last, for they would be lost when pixels are resampled.
    """

    image: UInt8[np.ndarray, "height width 3"]
    name: str
    above: Block = ()
    below: Block = ()
    grid: Segments = ()


@dataclass(frozen=True)
class Row:
    """Text on the left, panels to the right of it, from column `first` on."""

    label: Block
    cells: Sequence[Cell]
    first: int = 0


@dataclass(frozen=True)
class Grid:
    """Measures of the sheet's columns."""

    panel: tuple[float, float]  # (width, height)
    columns: int
    label: float = 1.45
    gap: float = 0.16
    margin: float = 0.2
    start: float = 0.0  # where it begins, beyond the margin

    @property
    def cell(self) -> float:
        """Width of a column: a thin panel still leaves room for its words."""
        return max(self.panel[0], 1.6)

    def left(self, column: int) -> float:
        """Where a column begins."""
        return self.start + self.margin + self.label + self.gap + column * (self.cell + self.gap)

    def width(self, columns: int) -> float:
        """Of the label and so many columns, with the gap after them."""
        return self.label + self.gap + columns * (self.cell + self.gap)


@dataclass
class Sheet:
    """What will be drawn, gathered from top to bottom; the size is known at the end."""

    width: float
    grids: list[list[Segment]] = field(default_factory=list)
    texts: list[tuple[float, float, str, Line]] = field(default_factory=list)
    images: list[tuple[tuple[float, float, float, float], UInt8[np.ndarray, "height width 3"], str]] = field(
        default_factory=list
    )

    def block(self, block: Block, x: float, y: float, width: float, *, anchor_bottom: bool = False) -> float:
        """Write paragraphs from `y` downwards (or so that they end there) and return the height they take."""
        pieces = [(item, item.wrapped(width) if isinstance(item, Line) else []) for item in block]
        total = sum((_height(item, lines) for item, lines in pieces), 0.0)
        top = y - total if anchor_bottom else y
        for item, lines in pieces:
            if isinstance(item, Line):
                first = top + item.space
                self.texts += [
                    (x, first + fonts.height_of(number, item.size), text, item) for number, text in enumerate(lines)
                ]
            else:
                self._bar(item, x, top)
            top += _height(item, lines)
        return total

    def _bar(self, bar: Bar, x: float, y: float) -> None:
        line = Line("", 7.0)
        start = x + fonts.width_of(bar.low, line.size) + 0.06
        self.texts.append((x, y + 0.03, bar.low, line))
        self.images.append(((start, y + 0.04, 1.5, 0.1), bar.table[None], "bar"))
        self.texts.append((start + 1.56, y + 0.03, bar.high, line))

    def rows(self, rows: Sequence[Row], grid: Grid, y: float) -> float:
        """Place rows from `y` downwards and return the height they take."""
        start = y
        for row in rows:
            above = max((_block_height(cell.above, grid.cell) for cell in row.cells), default=0.0)
            y += above
            depth = self.block(row.label, grid.start + grid.margin, y, grid.label)
            for column, cell in enumerate(row.cells, row.first):
                x = grid.left(column)
                self.block(cell.above, x, y - 0.03, grid.cell, anchor_bottom=True)
                self.images.append(((x, y, *grid.panel), cell.image, cell.name))
                if cell.grid:
                    across, down = grid.panel
                    self.grids.append(
                        [
                            ((x + u * across, y + v * down), (x + s * across, y + t * down))
                            for (u, v), (s, t) in cell.grid
                        ]
                    )
                below = self.block(cell.below, x, y + grid.panel[1] + 0.04, grid.cell)
                depth = max(depth, grid.panel[1] + 0.04 + below)
            y += depth + grid.gap
        return y - start

    def figure(self, height: float) -> Figure:
        """The finished figure, `height` inches high."""
        figure = Figure((self.width, height), dpi=min(DPI, MOST_PIXELS / max(self.width, height)), facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(height, 0))
        axes.set_axis_off()
        for (x, y, width, depth), pixels, name in self.images:
            image = AxesImage(axes, extent=(x, x + width, y + depth, y), origin="upper", interpolation="antialiased")
            image.set_data(pixels)
            image.set_gid(name)
            axes.add_image(image)
            axes.add_patch(Rectangle((x, y), width, depth, fill=False, edgecolor="#bbbbbb", linewidth=0.5))
        for lines in self.grids:
            _draw_grid(axes, lines)
        for x, y, text, line in self.texts:
            write(axes, x, y, text, line)
        return figure


def _draw_grid(axes: Axes, lines: list[Segment]) -> None:
    # A dark and a light line, snapped to whole pixels of the finished figure: the same strength on every ground.
    for colour, width in (((0.0, 0.0, 0.0, 0.3), 0.9), ((1.0, 1.0, 1.0, 0.45), 0.45)):
        drawn = LineCollection(lines, colors=[colour], linewidths=width, antialiaseds=True, linestyles="solid")
        drawn.set_snap(True)
        axes.add_collection(drawn, autolim=False)


def write(axes: Axes, x: float, y: float, text: str, line: Line, align: str = "left", gid: str | None = None) -> None:
    """Write one line of text whose top is at `y`; `gid` finds it in the figure."""
    # Every property is said, so that no setting of the user's own matplotlib reads text as markup or moves it.
    options: dict[str, Any] = {
        "fontsize": line.size, "fontweight": line.weight, "fontstyle": "normal", "color": line.colour,
        "fontfamily": fonts.families(text, line.weight), "ha": align, "va": "baseline",
        "parse_math": False, "usetex": False, "gid": gid,
    }  # fmt: skip
    axes.text(x, y + line.size / 72, text, **options)


def _height(item: Line | Bar, lines: Sequence[str]) -> float:
    return item.space + fonts.height_of(len(lines), item.size) if isinstance(item, Line) else 0.2


def _block_height(block: Block, width: float) -> float:
    return sum((_height(item, item.wrapped(width) if isinstance(item, Line) else ()) for item in block), 0.0)


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
