"""A sheet of labelled panels as a matplotlib figure, without pyplot. Lengths are inches, origin top-left."""

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
# Agg cannot draw 2^16 pixels in a row: longer sheets get fewer pixels per inch.
MOST_PIXELS = 40_000

INK, QUIET, ALERT = "#1a1a1a", "#666666", "#a13d00"

BROADEST = 16.0  # inches of a sheet


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text, wrapped to the width of its place and cut after `most` lines. `size` in points."""

    text: str
    size: float = 7.0
    colour: str = QUIET
    weight: str = "normal"
    most: int | None = None
    space: float = 0.0  # inches above
    ending: str = fonts.ELLIPSIS  # of a cut paragraph

    def wrapped(self, width: float) -> list[str]:
        """The lines, at most `width` inches wide."""
        return fonts.wrap(self.text, width, self.size, self.weight, self.most, self.ending)


@dataclass(frozen=True)
class Bar:
    """A colour bar with a label at each end."""

    table: UInt8[np.ndarray, "256 3"]
    low: str
    high: str


Block = Sequence[Paragraph | Bar]


@dataclass(frozen=True)
class Panel:
    """A panel with the text above and below it; `name` is the gid of its image in the figure.

    `lines` are drawn over it, as fractions of the panel. They are drawn last: resampling pixels would lose them.
    """

    image: UInt8[np.ndarray, "height width 3"]
    name: str
    above: Block = ()
    below: Block = ()
    lines: Segments = ()


@dataclass(frozen=True)
class Row:
    """A label and the panels to the right of it, from column `first` on."""

    label: Block
    panels: Sequence[Panel]
    first: int = 0


@dataclass(frozen=True)
class PanelGrid:
    """Measures of the columns of panels."""

    panel: tuple[float, float]  # (width, height)
    columns: int
    label: float = 1.45
    gap: float = 0.16
    margin: float = 0.2
    start: float = 0.0  # left edge, without the margin

    @property
    def column(self) -> float:
        """Width of a column: above a thin panel there is still room for text."""
        return max(self.panel[0], 1.6)

    def left(self, column: int) -> float:
        """Left edge of a column."""
        return self.start + self.margin + self.label + self.gap + column * (self.column + self.gap)

    def width(self, columns: int) -> float:
        """Width of the label and `columns` columns, with the gap after them."""
        return self.label + self.gap + columns * (self.column + self.gap)


@dataclass
class Sheet:
    """Content of a figure, collected from top to bottom; its height is known at the end."""

    width: float
    grids: list[list[Segment]] = field(default_factory=list)
    texts: list[tuple[float, float, str, Paragraph]] = field(default_factory=list)
    images: list[tuple[tuple[float, float, float, float], UInt8[np.ndarray, "height width 3"], str]] = field(
        default_factory=list
    )

    def block(self, block: Block, x: float, y: float, width: float, *, anchor_bottom: bool = False) -> float:
        """Add paragraphs from `y` downwards (or ending at `y`) and return their height."""
        pieces = [(item, item.wrapped(width) if isinstance(item, Paragraph) else []) for item in block]
        total = sum((_height(item, lines) for item, lines in pieces), 0.0)
        top = y - total if anchor_bottom else y
        for item, lines in pieces:
            if isinstance(item, Paragraph):
                first = top + item.space
                self.texts += [
                    (x, first + fonts.height_of(number, item.size), text, item) for number, text in enumerate(lines)
                ]
            else:
                self._bar(item, x, top)
            top += _height(item, lines)
        return total

    def _bar(self, bar: Bar, x: float, y: float) -> None:
        line = Paragraph("", 7.0)
        start = x + fonts.width_of(bar.low, line.size) + 0.06
        self.texts.append((x, y + 0.03, bar.low, line))
        self.images.append(((start, y + 0.04, 1.5, 0.1), bar.table[None], "bar"))
        self.texts.append((start + 1.56, y + 0.03, bar.high, line))

    def rows(self, rows: Sequence[Row], grid: PanelGrid, y: float) -> float:
        """Add rows of panels from `y` downwards and return their height."""
        start = y
        for row in rows:
            above = max((_block_height(one.above, grid.column) for one in row.panels), default=0.0)
            y += above
            depth = self.block(row.label, grid.start + grid.margin, y, grid.label)
            for column, one in enumerate(row.panels, row.first):
                x = grid.left(column)
                self.block(one.above, x, y - 0.03, grid.column, anchor_bottom=True)
                self.images.append(((x, y, *grid.panel), one.image, one.name))
                if one.lines:
                    across, down = grid.panel
                    self.grids.append(
                        [
                            ((x + u * across, y + v * down), (x + s * across, y + t * down))
                            for (u, v), (s, t) in one.lines
                        ]
                    )
                below = self.block(one.below, x, y + grid.panel[1] + 0.04, grid.column)
                depth = max(depth, grid.panel[1] + 0.04 + below)
            y += depth + grid.gap
        return y - start

    def figure(self, height: float) -> Figure:
        """The figure, `height` inches high."""
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
    # A dark and a light line, snapped to whole pixels of the figure: equally visible on every background.
    for colour, width in (((0.0, 0.0, 0.0, 0.3), 0.9), ((1.0, 1.0, 1.0, 0.45), 0.45)):
        drawn = LineCollection(lines, colors=[colour], linewidths=width, antialiaseds=True, linestyles="solid")
        drawn.set_snap(True)
        axes.add_collection(drawn, autolim=False)


def write(
    axes: Axes, x: float, y: float, text: str, line: Paragraph, align: str = "left", gid: str | None = None
) -> None:
    """Draw one line of text whose top is at `y`; `gid` is its id in the figure."""
    # All properties are set, so that no matplotlib setting of the user parses text as markup or moves it.
    options: dict[str, Any] = {
        "fontsize": line.size, "fontweight": line.weight, "fontstyle": "normal", "color": line.colour,
        "fontfamily": fonts.families(text, line.weight), "ha": align, "va": "baseline",
        "parse_math": False, "usetex": False, "gid": gid,
    }  # fmt: skip
    axes.text(x, y + line.size / 72, text, **options)


def _height(item: Paragraph | Bar, lines: Sequence[str]) -> float:
    return item.space + fonts.height_of(len(lines), item.size) if isinstance(item, Paragraph) else 0.2


def _block_height(block: Block, width: float) -> float:
    return sum((_height(item, item.wrapped(width) if isinstance(item, Paragraph) else ()) for item in block), 0.0)


# Width : height from which an image is treated as a line of text.
FLAT = 3.5
NARROWEST_LINE = 3.2  # inches
# Height of a line in inches by the largest number of panels it holds for; LEAST_DEPTH for more panels.
LINE_DEPTHS = ((24, 0.6), (160, 0.45))
LEAST_DEPTH = 0.35
# A line may be smaller by SLACK so that one more fits beside it, or larger by STRETCHED where there is room.
SLACK, STRETCHED = 0.9, 1.25


def panel_grid(ratio: float, columns: int, rows: int, *, together: bool = False) -> PanelGrid:
    """The columns of a sheet for `rows` x `columns` panels of images with this width : height.

    Lines of text that would be too small to read side by side get fewer columns than `columns`; with `together`, one.
    """
    if ratio >= FLAT:
        return _lines(ratio, columns, rows, together)
    # Area of a panel in square inches: smaller where there are many.
    area = 4.6 if rows <= 4 and columns <= 4 else 3.4 if rows <= 10 else 2.6
    width = min(sqrt(area * ratio), 4.6, 3.8 * ratio)
    return PanelGrid((width, width / ratio), columns)


def _lines(ratio: float, columns: int, rows: int, together: bool) -> PanelGrid:
    plain = PanelGrid((1.0, 1.0), 1)
    usable = BROADEST - 2 * plain.margin - plain.width(0)
    depth = next((d for most, d in LINE_DEPTHS if rows * columns <= most), LEAST_DEPTH)
    wish = max(NARROWEST_LINE, depth * ratio)
    fitting = [n for n in range(1, columns + 1) if usable / n - plain.gap >= SLACK * wish]
    most = max(fitting, default=1)
    # Four panels of which three fit are placed in two pairs.
    count = most if most == columns else 1 if together else ceil(columns / ceil(columns / most))
    width = min(usable / count - plain.gap, STRETCHED * wish)
    return PanelGrid((width, width / ratio), count)
