"""The figure of an inspection: what the layer saw, the map before and after the ReLU, the channel weights, and the
strongest channels with their gradients. Everything on the layer's own grid, one colour per cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from grounding.core.errors import OptionError
from grounding.core.geometry import Geometry
from grounding.core.images import Picture
from grounding.explanation import maps as mapping
from grounding.explanation.figures import wording
from grounding.explanation.figures.pixels import DIVERGING, FADE_TO, Rgb, colour_table, colours, draw_note, resized
from grounding.explanation.figures.sheet import (
    ALERT,
    BROADEST,
    DPI,
    INK,
    Bar,
    Block,
    Cell,
    Grid,
    Line,
    Row,
    Sheet,
    panel_grid,
)
from grounding.explanation.labels import title_in
from grounding.methods.base import THRESHOLD

if TYPE_CHECKING:
    from grounding.explanation.inspection import Inspection

MOST_CHANNELS = 64
ACROSS = (6, 4)  # panels side by side, channels with their gradients: as many as the sheet is broad for
HISTOGRAM = (3.2, 1.1)  # inches
BINS = 41
OVERSAMPLING = 2
COMPARED = "“Without it”: channels of the text that lacks the token; the score is the difference of the two texts'."
NARROWEST, WIDEST = 6.5, 8.0  # inches of the sheet, and of a paragraph


def figure(inspections: Sequence[Inspection], channels: int = 8, *, cmap: str = "magma") -> Figure:
    """One section per inspection, below each other; `channels` is how many of the strongest are shown.

    `cmap` colours the map after the ReLU; what has a sign is drawn around zero, each panel out to its own largest
    value. Raises OptionError.
    """
    check_channels(channels)
    colour_table(cmap)
    if not inspections:
        raise OptionError("nothing to draw: no inspection was given")
    sections = [_Section(one, channels, cmap) for one in inspections]
    width = max(NARROWEST, *(section.width for section in sections))
    sheet = Sheet(width)
    margin = sections[0].grid.margin
    y = margin + sheet.block(_words(inspections, cmap), margin, margin, min(width - 2 * margin, WIDEST))
    for section in sections:
        y += 2 * section.grid.gap
        y += section.place(sheet, y)
    return sheet.figure(y + margin)


def check_channels(channels: int) -> None:
    """Raises OptionError for a number of channels that cannot be drawn."""
    if not 1 <= channels <= MOST_CHANNELS:
        raise OptionError(f"channels to show must be from 1 to {MOST_CHANNELS}, got {channels}")


def _words(inspections: Sequence[Inspection], cmap: str) -> Block:
    """What stands once, above all sections."""
    first = inspections[0]
    warnings = dict.fromkeys(text for one in inspections for text in one.warnings)
    facts = (
        f"{wording.name_of(first.image.path)}, {first.image.width} x {first.image.height} pixels · "
        f"model {first.model.get('id') or 'unnamed'} · target {first.target}"
    )
    return [
        *([Line(f"“{first.caption}”", 12.0, INK, "bold", 5)] if first.caption else []),
        Line(facts, 8.0, INK, most=4),
        Line("Features, gradients and weights: zero is white, each panel out to its own largest value.", space=0.06),
        Bar(colour_table(DIVERGING), "below zero", "above"),
        Line("After the ReLU: from zero to the map's own highest value."),
        Bar(colour_table(cmap), "zero", "highest"),
        *([Line(COMPARED)] if any(one.compared for one in inspections) else []),
        *(Line(f"Warning: {text}", 7.5, ALERT, most=3) for text in warnings),
    ]


@dataclass
class _Section:
    """What is drawn of one inspection."""

    inspection: Inspection
    channels: int
    cmap: str

    @cached_property
    def grid(self) -> Grid:
        """Measures of the panels: the layer's grid as it lies on the model's input."""
        width, height = _frame(self.inspection.geometry)
        count = min(self.channels, len(self.inspection.weights))
        made = [panel_grid(width / height, min(most, max(3, 2 * count)), 2 + ceil(2 * count / most)) for most in ACROSS]
        return next((grid for grid in made if grid.width(grid.columns) <= BROADEST), made[-1])

    @property
    def _pairs(self) -> int:
        """Panels of channels side by side: a channel and its gradient stay together."""
        return max(1, self.grid.columns // 2 * 2)

    @property
    def width(self) -> float:
        """Inches that the section needs."""
        across = max(self.grid.width(self.grid.columns), self.grid.width(0) + HISTOGRAM[0] + self.grid.gap)
        return across - self.grid.gap + 2 * self.grid.margin

    def place(self, sheet: Sheet, y: float) -> float:
        """Put the section at `y`; return the height it takes."""
        start = y
        y += sheet.rows(_rows(self._label(), list(self._maps()), self.grid.columns), self.grid, y)
        y += sheet.rows([Row([_strong("Channel weights")], [self._histogram()])], Grid(HISTOGRAM, 1), y)
        label = [_strong("Strongest channels"), Line("by absolute weight")]
        y += sheet.rows(_rows(label, list(self._channels()), self._pairs), self.grid, y)
        return y - start

    def _label(self) -> Block:
        one = self.inspection
        options = ", ".join(f"{k} {v}" for k, v in one.options.items() if v)
        return [
            Line(title_in(one.caption, one.entry), 10.0, INK, "bold", 6),
            Line(wording.score_line(one.entry)),
            Line(one.title, 9.0, INK, "bold", 2, space=0.04),
            Line(wording.short_layer(one.layer), 6.5, most=3),
            Line(" x ".join(map(str, one.features.shape[:2])) + f" cells, {len(one.weights)} channels", 6.5),
            *([Line(options, 6.5, most=3)] if options else []),
        ]

    def _maps(self) -> Iterator[Cell]:
        one, name = self.inspection, "inspect"
        yield Cell(_seen(one.image, one.geometry, self._size), f"{name}:seen", [_strong("What the model saw")])
        below = [Line(f"raw {_range(one.map)}", 6.5)]
        yield Cell(self._around_zero(one.map), f"{name}:before", [_strong("Map before ReLU")], below)
        level = float(one.options.get(THRESHOLD, 0.0))
        title = f"After threshold {wording.number(level)}" if level else "Map after ReLU"
        if not one.status:
            pale = np.full((*self._size, 3), FADE_TO, np.uint8)
            note = [Line(f"no evidence: {one.status.reason}", 7.0, ALERT)]
            yield Cell(draw_note(pale, "no evidence"), f"{name}:after", [_strong(title)], note)
            return
        unit = mapping.rescale(self._cells(one.view), 0.0, float(one.view.max()))
        yield Cell(colours(unit, self.cmap), f"{name}:after", [_strong(title)], [Line(f"raw {_range(one.view)}", 6.5)])

    def _channels(self) -> Iterator[Cell]:
        one = self.inspection
        for index in one.strongest(self.channels):
            title = one.channel(index)
            mean = f"mean = weight {wording.number(float(one.weights[index]))}"
            for kind, values, words in (
                ("features", one.features[..., index], [_strong(title[0].upper() + title[1:]), Line("features", 6.5)]),
                ("gradients", one.gradients[..., index], [_strong("its gradient"), Line(mean, 6.5)]),
            ):
                below = [Line(f"raw {_range(values)}", 6.5)]
                yield Cell(self._around_zero(values), f"inspect:{kind}:{index}", words, below)

    def _histogram(self) -> Cell:
        weights = self.inspection.weights
        # A little further than the largest: its tick would lie under the panel's frame.
        reach = 1.05 * float(np.abs(weights).max()) or 1.0
        counts, _ = np.histogram(weights, BINS, (-reach, reach))
        marked = weights[list(self.inspection.strongest(self.channels))]
        size = round(HISTOGRAM[1] * DPI * OVERSAMPLING), round(HISTOGRAM[0] * DPI * OVERSAMPLING)
        pixels = _bars(counts, marked / reach, size)
        words = [
            Line(f"from {wording.number(-reach)} to {wording.number(reach)}, zero in the middle", 6.5),
            Line(f"highest bar: {counts.max()} of {len(weights)} channels · ticks: the strongest {len(marked)}", 6.5),
        ]
        return Cell(pixels, "inspect:weights", (), words)

    @cached_property
    def _size(self) -> tuple[int, int]:
        """(height, width) of a panel, pixels."""
        width, height = self.grid.panel
        return max(1, round(height * DPI * OVERSAMPLING)), max(1, round(width * DPI * OVERSAMPLING))

    def _cells(self, values: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "height width"]:
        """Each value as a rectangle of pixels."""
        rows, columns = (np.arange(n) * count // n for n, count in zip(self._size, values.shape, strict=True))
        return values[rows[:, None], columns[None, :]]

    def _around_zero(self, values: Float[np.ndarray, "rows columns"]) -> Rgb:
        reach = float(np.abs(values).max())
        if not reach:
            return np.full((*self._size, 3), 255, np.uint8)
        return colours(mapping.rescale(self._cells(values), -reach, reach), DIVERGING)


def _rows(label: Block, cells: list[Cell], across: int) -> list[Row]:
    return [Row([] if i else label, cells[i : i + across]) for i in range(0, len(cells), across)]


def _strong(text: str) -> Line:
    return Line(text, 8.0, INK, "bold", 2)


def _range(values: Float[np.ndarray, "rows columns"]) -> str:
    return wording.span((float(values.min()), float(values.max())))


def _frame(geometry: Geometry) -> tuple[float, float]:
    """(width, height) of what the grid covers, input pixels."""
    width, height = geometry.cell_size
    return width * geometry.columns, height * geometry.rows


def _seen(image: Picture, geometry: Geometry, size: tuple[int, int]) -> Rgb:
    """The picture as it lies under the grid, at `size`; grey where the model's input is padding."""
    panel = np.full((*size, 3), FADE_TO, np.uint8)
    frame = np.array(_frame(geometry))
    corners = geometry.points_to_input(np.reshape(geometry.seen, (2, 2))) / frame * size[::-1]
    x0, y0, x1, y1 = _pixels(corners.ravel().tolist(), size)
    crop = image.pil.crop(_pixels(geometry.seen, (image.height, image.width)))
    panel[y0:y1, x0:x1] = resized(crop, (y1 - y0, x1 - x0))
    return panel


def _pixels(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box (x0, y0, x1, y1) in whole pixels of an array of `size` (height, width), at least one each way."""
    (x0, x1), (y0, y1) = (
        (min(max(0, round(low)), most - 1), min(max(round(high), round(low) + 1, 1), most))
        for low, high, most in ((box[0], box[2], size[1]), (box[1], box[3], size[0]))
    )
    return x0, y0, x1, y1


def _bars(counts: np.ndarray, marks: np.ndarray, size: tuple[int, int]) -> Rgb:
    """Bars over [-1, 1], those below zero blue and above it red, a line at zero, and ticks at `marks` below them."""
    height, width = size
    table = colour_table(DIVERGING)
    panel = np.full((height, width, 3), 255, np.uint8)
    foot = height - max(2, height // 12)
    for i, count in enumerate(counts):
        left, right = (round(width * n / len(counts)) for n in (i, i + 1))
        top = foot - int(np.ceil(0.95 * foot * count / max(1, counts.max())))
        middle = 2 * i + 1 - len(counts)
        panel[top:foot, left : max(right - 1, left + 1)] = 150 if not middle else table[230 if middle > 0 else 25]
    panel[foot : foot + 1] = 120
    panel[:, width // 2] = 120
    for mark in marks:
        x = min(width - 2, max(1, round((mark + 1) / 2 * (width - 1))))
        panel[foot + 2 :, x - 1 : x + 1] = 0
    return panel
