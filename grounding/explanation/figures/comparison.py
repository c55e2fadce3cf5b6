"""The side-by-side figure of an explanation: a row per entry, a column per method, and a header."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from matplotlib.figure import Figure

from grounding.core.geometry import DETAIL
from grounding.explanation.explanation import Explanation, MethodMaps
from grounding.explanation.figures import header, wording
from grounding.explanation.figures.explanation_panels import ExplanationPanels, caption_limits, drawn_maps
from grounding.explanation.figures.header import NARROWEST, WIDEST
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.pixels import fit
from grounding.explanation.figures.sheet import (
    ALERT,
    BROADEST,
    INK,
    Block,
    Panel,
    PanelGrid,
    Paragraph,
    Row,
    Sheet,
    panel_grid,
)

MOST_WARNINGS = 8
WARNING_LINES = 3
BESIDE = 3.4  # inches to the right of the image from which the header is placed there and not above it
LONGEST_BLOCK = 8  # rows that are never split into several blocks
BETWEEN_BLOCKS = 0.15
APART = 0.14  # inches between entries of several lines
SLIMMEST = 1.5  # height : width of the blocks together
STORED = "… (whole with the maps)"


def figure(explanation: Explanation, **options: Any) -> Figure:
    """Draw all maps of an explanation side by side; `options` are those of `FigureOptions`.

    The area that the model did not see is hatched; a map without evidence is marked and has no colour. The raw minimum
    and maximum are written below every map. Raises OptionError, and GroundingError if the image of a loaded explanation
    is missing.
    """
    return draw(explanation, FigureOptions.of(options))


def draw(explanation: Explanation, options: FigureOptions) -> Figure:
    """The figure of `figure`, from validated options."""
    return _Comparison(explanation, options).draw()


@dataclass
class _Comparison:
    """The layout of one figure."""

    explanation: Explanation
    options: FigureOptions

    @cached_property
    def _shared(self) -> list[tuple[MethodMaps, str]]:
        """The methods, with the name of each view, whose maps all entries share."""
        return drawn_maps(m for m in self.explanation.methods.values() if m.shared)

    @cached_property
    def _own(self) -> list[tuple[MethodMaps, str]]:
        return drawn_maps(m for m in self.explanation.methods.values() if not m.shared)

    @cached_property
    def _single(self) -> bool:
        """Whether there is one entry: the image and all of its maps fit one row."""
        return len(self.explanation.entries) == 1

    @cached_property
    def _grid(self) -> PanelGrid:
        geometry = self.explanation.geometry
        height, width = fit(geometry.width, geometry.height, 1000)
        if self.options.layout == "panels":
            own, shared = (sum(view == DETAIL for _, view in group) for group in (self._own, self._shared))
            rows = len(self.explanation.entries) * own + shared
            return panel_grid(width / height, 2 + len(self.explanation.views), rows, together=True)
        if self._single:
            return panel_grid(width / height, 1 + len(self._own) + len(self._shared), 1)
        columns = max(1 + len(self._shared), len(self._own))
        return panel_grid(width / height, columns, 1 + len(self.explanation.entries))

    @cached_property
    def _wrapped(self) -> bool:
        """Whether the methods of an entry take several lines, so that no column belongs to one method."""
        return self.options.layout == "rows" and len(self._own) > self._grid.columns

    @cached_property
    def _panels(self) -> ExplanationPanels:
        limits = caption_limits([self.explanation], self.options)
        return ExplanationPanels(self.explanation, self.options, self._grid.panel, limits)

    def draw(self) -> Figure:
        """The figure."""
        grid, band, rows = self._grid, list(self._band()), list(self._rows())
        columns = max((len(row.panels) for row in rows), default=0)
        across = grid.width(columns) + BETWEEN_BLOCKS
        blocks = self._blocks(rows, across)
        width = max(across * len(blocks) - BETWEEN_BLOCKS, grid.width(len(band[0].panels)) if band else 0.0)
        sheet = Sheet(max(NARROWEST, width - grid.gap + 2 * grid.margin))
        y = self._top(sheet, band)
        depths = [sheet.rows(block, replace(grid, start=number * across), y) for number, block in enumerate(blocks)]
        return sheet.figure(y + max(depths, default=0.0) - grid.gap + grid.margin)

    def _top(self, sheet: Sheet, band: list[Row]) -> float:
        """Add the header, beside the band where there is room; return where the rows begin."""
        grid, block = self._grid, self._header()
        left = grid.left(len(band[0].panels) if band else 1) + 0.1
        room = sheet.width - grid.margin - left
        if band and room >= BESIDE:
            text = sheet.block(block, left, grid.margin, min(room, WIDEST)) + grid.gap
            return grid.margin + max(text, sheet.rows(band, grid, grid.margin))
        y = header.place(sheet, block, grid.margin) + grid.gap
        return y + sheet.rows(band, grid, y)

    def _header(self) -> Block:
        explanation, more = self.explanation, len(self.explanation.warnings) - MOST_WARNINGS
        warnings = explanation.warnings[:MOST_WARNINGS]
        return [
            *header.caption(explanation.caption, 5),
            Paragraph(wording.facts(explanation), 8.0, INK, most=4),
            *header.scale_and_legend(explanation, self.options),
            *header.warnings(warnings, WARNING_LINES, space=0.06, ending=STORED),
            *([Paragraph(f"and {more} more warnings, stored with the maps", 7.5, ALERT)] if more > 0 else []),
        ]

    def _blocks(self, rows: list[Row], width: float) -> list[list[Row]]:
        """The rows in one block, or in several side by side where the sheet would become a strip."""
        count = 1
        if len(rows) > LONGEST_BLOCK and all(row.label for row in rows):
            depth = self._grid.panel[1] + 0.5
            while depth * len(rows) / count > SLIMMEST * width * count and width * (count + 1) <= BROADEST:
                count += 1
        length = max(1, ceil(len(rows) / count))
        blocks = [rows[i : i + length] for i in range(0, len(rows), length)]
        return [[_with_headings(block[0], rows[0]), *block[1:]] for block in blocks]

    def _band(self) -> Iterator[Row]:
        """The image and the maps shared by all entries, above the rows; nothing where all fit one row."""
        if self.options.layout == "rows" and not self._single:
            label = [Paragraph("all entries", 10.0, INK, "bold")] if self._shared else []
            yield from self._lines(label, [self._panels.image(), *self._overlays(self._shared, 0)])

    def _rows(self) -> Iterator[Row]:
        if self.options.layout == "panels":
            yield from self._triples()
        elif self._single:
            overlays = self._overlays(drawn_maps(self.explanation.methods.values()), 0)
            yield from self._lines(self._panels.label(0), [self._panels.image(), *overlays])
        else:
            for entry in range(len(self.explanation.entries)):
                yield from self._lines(self._panels.label(entry), self._overlays(self._own, entry))

    def _overlays(self, maps: Sequence[tuple[MethodMaps, str]], entry: int) -> list[Panel]:
        return [self._overlay(method, entry, view) for method, view in maps]

    def _overlay(self, method: MethodMaps, entry: int, view: str) -> Panel:
        """An overlay, below the heading of its method in the first row, and below its title where lines are wrapped."""
        if entry == 0:
            return self._panels.overlay(method, entry, self._panels.heading(method, entry, view), view)
        second = wording.short_layer(method.layer or "") if view == DETAIL else view
        title = " · ".join(part for part in (method.title, second) if part)
        return self._panels.overlay(method, entry, [Paragraph(title, 6.5, most=1)] if self._wrapped else [], view)

    def _lines(self, label: Block, panels: list[Panel]) -> Iterator[Row]:
        """The panels of one entry in as many lines as they need, the label beside the first."""
        across = self._grid.columns
        if len(panels) > across:  # more space between entries than between the lines of one entry
            panels = [*(replace(one, above=_apart(one.above)) for one in panels[:across]), *panels[across:]]
        for start in range(0, max(1, len(panels)), across):
            yield Row([] if start else label, panels[start : start + across])

    def _triples(self) -> Iterator[Row]:
        """Image, heat map and overlay of each map: maps for all entries first, then entry by entry."""
        shared = [(m, 0) for m, view in self._shared if view == DETAIL]
        entries = range(len(self.explanation.entries))
        own = [(m, entry) for entry in entries for m, view in self._own if view == DETAIL]
        for number, (method, entry) in enumerate(shared + own):
            together = method.key not in self.explanation.separate
            title = [Paragraph("all entries", 10.0, INK, "bold")] if together else self._panels.label(entry)
            panels = self._panels.triple(method, entry, headed=number == 0)
            yield from self._lines([*title, *self._panels.heading(method, entry)], panels)


def _with_headings(row: Row, first: Row) -> Row:
    """`row` with the headings of the first row."""
    return replace(
        row, panels=[replace(one, above=top.above) for one, top in zip(row.panels, first.panels, strict=True)]
    )


def _apart(block: Block) -> Block:
    """The same block with more space above it."""
    return [
        replace(item, space=APART) if not i and isinstance(item, Paragraph) else item for i, item in enumerate(block)
    ]
