"""The figure of Grad-CAM's ingredients at one layer: input, map before and after the ReLU, weights, strongest channels.

All panels are on the layer's own grid, one colour per cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from grounding.core.errors import OptionError
from grounding.core.geometry import Geometry
from grounding.core.images import Picture
from grounding.explanation import maps as mapping
from grounding.explanation.figures import header, wording
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.pixels import DIVERGING, FADE_TO, Rgb, colour_table, colours, draw_note, resized
from grounding.explanation.figures.sheet import (
    ALERT,
    BROADEST,
    DPI,
    INK,
    Bar,
    Block,
    Panel,
    PanelGrid,
    Paragraph,
    Row,
    Sheet,
    panel_grid,
)
from grounding.explanation.inspection import CHANNELS, Inspection
from grounding.explanation.labels import title_in
from grounding.methods.options import THRESHOLD

MOST_CHANNELS = 64
ACROSS = (6, 4)  # panels side by side (channels with their gradients), the first number that fits the sheet
HISTOGRAM = (3.2, 1.1)  # inches
BINS = 41
COMPARED = (
    "“Without it”: channels of the text that lacks the token; the score is the difference of the scores of both texts."
)


def figure(inspections: Sequence[Inspection], channels: int = CHANNELS, **options: Any) -> Figure:
    """Draw one section per inspection, below each other, with the strongest `channels` of each.

    `options` are those of `FigureOptions`; only `cmap` and `oversampling` have an effect. `cmap` colours the map after
    the ReLU; signed values are drawn around zero, each panel to its own largest absolute value. Raises OptionError.
    """
    return draw(inspections, channels, FigureOptions.of(options))


def draw(inspections: Sequence[Inspection], channels: int, options: FigureOptions) -> Figure:
    """The figure of `figure`, from validated options. Raises OptionError."""
    check_channels(channels)
    if not inspections:
        raise OptionError("nothing to draw: no inspection was given")
    sections = [_Section(one, channels, options) for one in inspections]
    sheet = Sheet(max(header.NARROWEST, *(section.width for section in sections)))
    margin = sections[0].grid.margin
    y = header.place(sheet, _header(inspections, options), margin)
    for section in sections:
        y += 2 * section.grid.gap
        y += section.place(sheet, y)
    return sheet.figure(y + margin)


def check_channels(channels: int) -> None:
    """Check the number of channels to draw. Raises OptionError."""
    if not 1 <= channels <= MOST_CHANNELS:
        raise OptionError(f"channels to show must be from 1 to {MOST_CHANNELS}, got {channels}")


def _header(inspections: Sequence[Inspection], options: FigureOptions) -> Block:
    first = inspections[0]
    facts = [wording.image_facts(first.image), wording.model_name(first.model), f"target {first.target}"]
    scale = "Features, gradients and weights: zero is white, each panel to its own largest absolute value."
    return [
        *header.caption(first.caption, 5),
        Paragraph(" · ".join(facts), 8.0, INK, most=4),
        Paragraph(scale, space=0.06),
        Bar(colour_table(DIVERGING), "below zero", "above"),
        Paragraph("After the ReLU: from zero to the map's own highest value."),
        Bar(colour_table(options.cmap), "zero", "highest"),
        *([Paragraph(COMPARED)] if any(one.compared for one in inspections) else []),
        *header.warnings(dict.fromkeys(text for one in inspections for text in one.warnings), 3),
    ]


@dataclass
class _Section:
    """The panels of one inspection."""

    inspection: Inspection
    channels: int
    options: FigureOptions

    @cached_property
    def grid(self) -> PanelGrid:
        """Columns of panels with the aspect ratio of the layer's grid on the model input."""
        width, height = _frame(self.inspection.geometry)
        count = min(self.channels, len(self.inspection.weights))
        made = [panel_grid(width / height, min(most, max(3, 2 * count)), 2 + ceil(2 * count / most)) for most in ACROSS]
        return next((grid for grid in made if grid.width(grid.columns) <= BROADEST), made[-1])

    @property
    def _pairs(self) -> int:
        """Number of channel panels side by side: a channel and its gradient are not separated."""
        return max(1, self.grid.columns // 2 * 2)

    @property
    def width(self) -> float:
        """Width of the section in inches."""
        across = max(self.grid.width(self.grid.columns), self.grid.width(0) + HISTOGRAM[0] + self.grid.gap)
        return across - self.grid.gap + 2 * self.grid.margin

    def place(self, sheet: Sheet, y: float) -> float:
        """Add the section to `sheet` at `y` and return its height."""
        start = y
        y += sheet.rows(_rows(self._label(), list(self._maps()), self.grid.columns), self.grid, y)
        y += sheet.rows([Row([_strong("Channel weights")], [self._histogram()])], PanelGrid(HISTOGRAM, 1), y)
        label = [_strong("Strongest channels"), Paragraph("by absolute weight")]
        y += sheet.rows(_rows(label, list(self._channels()), self._pairs), self.grid, y)
        return y - start

    def _label(self) -> Block:
        one = self.inspection
        method_options = ", ".join(f"{k} {v}" for k, v in one.options.items() if v)
        return [
            Paragraph(title_in(one.caption, one.entry), 10.0, INK, "bold", 6),
            Paragraph(wording.score_line(one.entry)),
            Paragraph(one.title, 9.0, INK, "bold", 2, space=0.04),
            Paragraph(wording.short_layer(one.layer), 6.5, most=3),
            Paragraph(" x ".join(map(str, one.features.shape[:2])) + f" cells, {len(one.weights)} channels", 6.5),
            *([Paragraph(method_options, 6.5, most=3)] if method_options else []),
        ]

    def _maps(self) -> Iterator[Panel]:
        one, name = self.inspection, "inspect"
        yield Panel(_seen(one.image, one.geometry, self._size), f"{name}:seen", [_strong("Model input")])
        yield Panel(self._around_zero(one.map), f"{name}:before", [_strong("Map before ReLU")], _raw(one.map))
        level = float(one.options.get(THRESHOLD, 0.0))
        title = f"After threshold {wording.number(level)}" if level else "Map after ReLU"
        if not one.status:
            pale = np.full((*self._size, 3), FADE_TO, np.uint8)
            note = [Paragraph(f"no evidence: {one.status.reason}", 7.0, ALERT)]
            yield Panel(draw_note(pale, "no evidence"), f"{name}:after", [_strong(title)], note)
            return
        unit = mapping.rescale(self._cells(one.view), 0.0, float(one.view.max()))
        yield Panel(colours(unit, self.options.cmap), f"{name}:after", [_strong(title)], _raw(one.view))

    def _channels(self) -> Iterator[Panel]:
        one = self.inspection
        for index in one.strongest(self.channels):
            title = one.channel(index)
            mean = f"mean = weight {wording.number(float(one.weights[index]))}"
            for kind, values, above in (
                (
                    "features",
                    one.features[..., index],
                    [_strong(title[0].upper() + title[1:]), Paragraph("features", 6.5)],
                ),
                ("gradients", one.gradients[..., index], [_strong("its gradient"), Paragraph(mean, 6.5)]),
            ):
                yield Panel(self._around_zero(values), f"inspect:{kind}:{index}", above, _raw(values))

    def _histogram(self) -> Panel:
        weights = self.inspection.weights
        # Beyond the largest weight: at the limit its tick would be hidden by the frame of the panel.
        reach = 1.05 * float(np.abs(weights).max()) or 1.0
        counts, _ = np.histogram(weights, BINS, (-reach, reach))
        marked = weights[list(self.inspection.strongest(self.channels))]
        pixels = _bars(counts, marked / reach, self._pixels(HISTOGRAM))
        below = [
            Paragraph(f"from {wording.number(-reach)} to {wording.number(reach)}, zero at the centre", 6.5),
            Paragraph(
                f"highest bar: {counts.max()} of {len(weights)} channels · ticks: the strongest {len(marked)}", 6.5
            ),
        ]
        return Panel(pixels, "inspect:weights", (), below)

    @cached_property
    def _size(self) -> tuple[int, int]:
        """(height, width) of a panel, pixels."""
        return self._pixels(self.grid.panel)

    def _pixels(self, inches: tuple[float, float]) -> tuple[int, int]:
        """(height, width) in pixels of a panel of (width, height) inches."""
        factor = DPI * self.options.oversampling
        return max(1, round(inches[1] * factor)), max(1, round(inches[0] * factor))

    def _cells(self, values: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "height width"]:
        """Each value repeated over a rectangle of pixels."""
        rows, columns = (np.arange(n) * count // n for n, count in zip(self._size, values.shape, strict=True))
        return values[rows[:, None], columns[None, :]]

    def _around_zero(self, values: Float[np.ndarray, "rows columns"]) -> Rgb:
        reach = float(np.abs(values).max())
        if not reach:
            return np.full((*self._size, 3), 255, np.uint8)
        return colours(mapping.rescale(self._cells(values), -reach, reach), DIVERGING)


def _rows(label: Block, cells: list[Panel], across: int) -> list[Row]:
    return [Row([] if i else label, cells[i : i + across]) for i in range(0, len(cells), across)]


def _strong(text: str) -> Paragraph:
    return Paragraph(text, 8.0, INK, "bold", 2)


def _raw(values: Float[np.ndarray, "rows columns"]) -> Block:
    return [Paragraph(f"raw {wording.span((float(values.min()), float(values.max())))}", 6.5)]


def _frame(geometry: Geometry) -> tuple[float, float]:
    """(width, height) of the area that the grid covers, pixels of the model input."""
    width, height = geometry.cell_size
    return width * geometry.columns, height * geometry.rows


def _seen(image: Picture, geometry: Geometry, size: tuple[int, int]) -> Rgb:
    """The part of the image that the grid covers, at `size` (height, width); grey where the model input is padding."""
    panel = np.full((*size, 3), FADE_TO, np.uint8)
    frame = np.array(_frame(geometry))
    corners = geometry.points_to_input(np.reshape(geometry.seen, (2, 2))) / frame * size[::-1]
    x0, y0, x1, y1 = _whole_pixels(corners.ravel().tolist(), size)
    crop = image.pil.crop(_whole_pixels(geometry.seen, (image.height, image.width)))
    panel[y0:y1, x0:x1] = resized(crop, (y1 - y0, x1 - x0))
    return panel


def _whole_pixels(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box (x0, y0, x1, y1) in whole pixels of an array of `size` (height, width), at least one each way."""
    (x0, x1), (y0, y1) = (
        (min(max(0, round(low)), most - 1), min(max(round(high), round(low) + 1, 1), most))
        for low, high, most in ((box[0], box[2], size[1]), (box[1], box[3], size[0]))
    )
    return x0, y0, x1, y1


def _bars(counts: np.ndarray, marks: np.ndarray, size: tuple[int, int]) -> Rgb:
    """Bars over [-1, 1], blue below zero and red above it, a line at zero, and ticks at `marks` below the bars."""
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
