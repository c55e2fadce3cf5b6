"""What stands where in the figure: the picture, a row per entry, a column per method, and the words around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import cast

from matplotlib.figure import Figure

from grounding.explanation.explanation import Explanation, MethodMaps, PatchMap
from grounding.explanation.figures import wording
from grounding.explanation.figures.options import _check
from grounding.explanation.figures.painter import Limits, Painter, has_evidence, limits_of
from grounding.explanation.figures.pixels import Segment, Style, colour_table, distorted, fit, grid_lines
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
from grounding.explanation.labels import next_best
from grounding.explanation.maps import Scale

MOST_WARNINGS = 8
WARNING_LINES = 3
NARROWEST = 6.5  # inches: room for the words above
WIDEST = 8.0  # inches of a paragraph
BESIDE = 3.4  # inches to the right of the picture from which the words stand there and not above it
LONGEST_BLOCK = 8  # rows that always stand in one block
BETWEEN_BLOCKS = 0.15
APART = 0.14  # inches between entries of several lines
SLIMMEST = 1.5  # height : width of the blocks together
STORED = "… (whole with the maps)"
# Panels hold more pixels than the figure shows at its own resolution, so that print at 300 dpi stays sharp.
OVERSAMPLING = 2


@dataclass
class Comparison:
    """One figure in the making: all maps of an explanation, with the words that make them readable."""

    explanation: Explanation
    style: Style
    scale: Scale
    fixed: Limits | None
    layout: str

    @cached_property
    def _shared(self) -> list[MethodMaps]:
        return [c for c in self.explanation.methods.values() if c.shared]

    @cached_property
    def _own(self) -> list[MethodMaps]:
        return [c for c in self.explanation.methods.values() if not c.shared]

    @cached_property
    def _single(self) -> bool:
        """One entry: the picture and all of its maps fit one row."""
        return len(self.explanation.entries) == 1

    @cached_property
    def _grid(self) -> Grid:
        geometry = self.explanation.geometry
        height, width = fit(geometry.width, geometry.height, 1000)
        if self.layout == "panels":
            rows = len(self.explanation.entries) * len(self._own) + len(self._shared)
            return panel_grid(width / height, 3, rows, together=True)
        if self._single:
            return panel_grid(width / height, 1 + len(self._own) + len(self._shared), 1)
        columns = max(1 + len(self._shared), len(self._own))
        return panel_grid(width / height, columns, 1 + len(self.explanation.entries))

    @cached_property
    def _wrapped(self) -> bool:
        """Whether the methods of an entry stand in several lines, so that no column belongs to one method."""
        return self.layout == "rows" and len(self._own) > self._grid.columns

    @cached_property
    def _painter(self) -> Painter:
        longest = round(max(self._grid.panel) * DPI * OVERSAMPLING)
        geometry = self.explanation.geometry
        size = fit(geometry.width, geometry.height, longest)
        return Painter(self.explanation.image.pil, geometry, size, self.style, grid=False)

    @cached_property
    def _titles(self) -> list[str]:
        return wording.entry_titles(self.explanation)

    def draw(self) -> Figure:
        """The figure."""
        grid, band, rows = self._grid, list(self._band()), list(self._rows())
        columns = max((len(row.cells) for row in rows), default=0)
        across = grid.width(columns) + BETWEEN_BLOCKS
        blocks = self._blocks(rows, across)
        width = max(across * len(blocks) - BETWEEN_BLOCKS, grid.width(len(band[0].cells)) if band else 0.0)
        sheet = Sheet(max(NARROWEST, width - grid.gap + 2 * grid.margin))
        y = self._top(sheet, band)
        depths = [sheet.rows(block, replace(grid, start=number * across), y) for number, block in enumerate(blocks)]
        return sheet.figure(y + max(depths, default=0.0) - grid.gap + grid.margin)

    def _top(self, sheet: Sheet, band: list[Row]) -> float:
        """Write the words, beside the band where there is room; return where the rows begin."""
        grid, words = self._grid, self._words()
        left = grid.left(len(band[0].cells) if band else 1) + 0.1
        room = sheet.width - grid.margin - left
        if band and room >= BESIDE:
            text = sheet.block(words, left, grid.margin, min(room, WIDEST)) + grid.gap
            return grid.margin + max(text, sheet.rows(band, grid, grid.margin))
        y = grid.margin + sheet.block(words, grid.margin, grid.margin, min(sheet.width - 2 * grid.margin, WIDEST))
        return y + grid.gap + sheet.rows(band, grid, y + grid.gap)

    def _blocks(self, rows: list[Row], width: float) -> list[list[Row]]:
        """Many rows stand in several blocks side by side, read downwards, so that the sheet does not become a strip."""
        count = 1
        if len(rows) > LONGEST_BLOCK and all(row.label for row in rows):
            depth = self._grid.panel[1] + 0.5
            while depth * len(rows) / count > SLIMMEST * width * count and width * (count + 1) <= BROADEST:
                count += 1
        length = max(1, ceil(len(rows) / count))
        blocks = [rows[i : i + length] for i in range(0, len(rows), length)]
        return [[replace(block[0], cells=self._titled(block[0], rows[0])), *block[1:]] for block in blocks]

    @staticmethod
    def _titled(row: Row, titles: Row) -> list[Cell]:
        return [replace(cell, above=title.above) for cell, title in zip(row.cells, titles.cells, strict=True)]

    def _words(self) -> Block:
        """What stands once in the figure: caption, model, scale, legend, warnings."""
        explanation = self.explanation
        caption = [Line(f"“{explanation.caption}”", 12.0, INK, "bold", 5)] if explanation.caption else []
        scale = wording.scale_note(explanation.methods.values(), self.style, self.scale, self.fixed)
        notes = [wording.legend(explanation, self.style), wording.score_note(explanation)]
        warnings = explanation.warnings
        block: list[Line | Bar] = [
            *caption,
            Line(wording.facts(explanation), 8.0, INK, most=4),
            Line(scale, space=0.06),
            *self._bars(),
            *(Line(note) for note in notes if note),
            *(
                Line(f"Warning: {text}", 7.5, ALERT, most=WARNING_LINES, space=0.0 if i else 0.06, ending=STORED)
                for i, text in enumerate(warnings[:MOST_WARNINGS])
            ),
        ]
        if len(warnings) > MOST_WARNINGS:
            block.append(Line(f"and {len(warnings) - MOST_WARNINGS} more warnings, stored with the maps", 7.5, ALERT))
        return block

    def _bars(self) -> Iterator[Line | Bar]:
        """One colour bar, or two with the names of the methods each belongs to."""
        plain, around = wording.drawn_around_zero(self.explanation.methods.values(), self.style)
        ends = ("lowest", "highest") if self.fixed is None else self.fixed
        signed = ("against", "for") if self.fixed is None else wording.symmetric(self.fixed)
        for columns, name, (low, high) in ((plain, self.style.cmap, ends), (around, self.style.diverging, signed)):
            if columns:
                if plain and around:
                    yield Line(wording.titles(columns) + ":", most=2, space=0.05)
                yield Bar(colour_table(name), _end(low), _end(high))

    def _band(self) -> Iterator[Row]:
        """The picture and the maps that are one for all entries, above the rows; not where all fit one row."""
        if self.layout == "rows" and not self._single:
            cells = [self._overlay_cell(c, 0, titled=True) for c in self._shared]
            yield from self._lines_of(self._image_label(), [self._image_cell(), *cells])

    def _rows(self) -> Iterator[Row]:
        if self.layout == "panels":
            yield from self._triples()
        elif self._single:
            cells = [self._overlay_cell(c, 0, titled=True) for c in self.explanation.methods.values()]
            yield from self._lines_of(self._entry_label(0), [self._image_cell(), *cells])
        else:
            for entry in range(len(self.explanation.entries)):
                cells = [self._overlay_cell(c, entry, titled=entry == 0) for c in self._own]
                yield from self._lines_of(self._entry_label(entry), cells)

    def _lines_of(self, label: Block, cells: list[Cell]) -> Iterator[Row]:
        """The panels of one entry in as many lines as they need, the label beside the first."""
        across = self._grid.columns
        if len(cells) > across:  # what belongs together stands closer together
            cells = [*(replace(cell, above=_apart(cell.above)) for cell in cells[:across]), *cells[across:]]
        for start in range(0, max(1, len(cells)), across):
            yield Row([] if start else label, cells[start : start + across])

    def _triples(self) -> Iterator[Row]:
        """picture | heat map | overlay: maps for all entries first, then entry by entry."""
        jobs = [(c, 0) for c in self._shared] + [
            (c, e) for e in range(len(self.explanation.entries)) for c in self._own
        ]
        for number, (column, entry) in enumerate(jobs):
            titles = [[Line(t, 9.0, INK, "bold")] if number == 0 else [] for t in ("Picture", "Heat map", "Overlay")]
            found = self._map(column, entry)
            limits = self._limits(column, entry)
            name = f"{column.key}:{entry}"
            lines = self._lines_over(found, limits)
            heat, overlay = self._painter.heat(found, limits), self._painter.overlay(found, limits)
            label = [Line("all entries", 10.0, INK, "bold")] if column.shared else self._entry_label(entry)
            cells = [
                Cell(self._painter.image, "picture", titles[0], self._stretch_note()),
                Cell(heat, f"heat:{name}", titles[1], self._below(found, limits), lines),
                Cell(overlay, f"overlay:{name}", titles[2], grid=lines),
            ]
            yield from self._lines_of([*label, *self._column_lines(column, limits)], cells)

    def _map(self, column: MethodMaps, entry: int) -> PatchMap:
        return self.explanation.map(entry, column.key)

    def _limits(self, column: MethodMaps, entry: int) -> Limits:
        if self.scale == "caption":
            return self._caption_limits[column.key]
        return limits_of([self._map(column, entry)], self.style, self.scale, self.fixed)

    @cached_property
    def _caption_limits(self) -> dict[str, Limits]:
        entries = range(len(self.explanation.entries))
        return {
            key: limits_of([self._map(column, e) for e in entries], self.style, self.scale)
            for key, column in self.explanation.methods.items()
        }

    def _image_label(self) -> Block:
        return [Line("all entries", 10.0, INK, "bold")] if self._shared else []

    def _entry_label(self, entry: int) -> Block:
        item = self.explanation.entries[entry]
        others = next_best(item)
        return [
            Line(self._titles[entry], 10.0, INK, "bold", 6),
            Line(wording.score_line(item)),
            *([Line(f"or: {others}", 6.5, most=2)] if others else []),
        ]

    def _column_lines(self, column: MethodMaps, limits: Limits) -> list[Line]:
        options = wording.changed_options(column)
        note = [Line(wording.shared_note(self.explanation), 7.0, ALERT)] if column.shared else []
        shown = self.scale == "caption" and limits[0] < limits[1]
        return [
            Line(column.title, 9.0, INK, "bold", 2),
            *([Line(wording.short_layer(column.layer), 6.5, most=3)] if column.layer else []),
            *([Line(options, 6.5, most=3)] if options else []),
            *note,
            *([Line(f"scale {wording.span(limits)}")] if shown else []),
        ]

    def _image_cell(self) -> Cell:
        return Cell(self._painter.image, "picture", [Line("Picture", 9.0, INK, "bold")], self._stretch_note())

    def _overlay_cell(self, column: MethodMaps, entry: int, *, titled: bool) -> Cell:
        found, limits = self._map(column, entry), self._limits(column, entry)
        short = " · ".join(part for part in (column.title, wording.short_layer(column.layer or "")) if part)
        above = self._column_lines(column, limits) if titled else [Line(short, 6.5, most=1)] if self._wrapped else []
        panel, name = self._painter.overlay(found, limits), f"overlay:{column.key}:{entry}"
        return Cell(panel, name, above, self._below(found, limits), self._lines_over(found, limits))

    def _below(self, found: PatchMap, limits: Limits) -> Block:
        low, _ = found.range
        raw = Line(f"raw {wording.span(found.range)}" if low == low else "raw: none seen", 6.5)
        if has_evidence(found, limits):
            cut = wording.clipping(found, self.style, limits) if self.scale == "fixed" else ""
            return [raw, *([Line(cut, 6.5, ALERT)] if cut else [])]
        reason = found.status.reason or "a single value: no range to draw"
        return [Line(f"no evidence: {reason}", 7.0, ALERT), raw]

    def _lines_over(self, found: PatchMap, limits: Limits) -> list[Segment]:
        return grid_lines(found.geometry) if self.style.grid and has_evidence(found, limits) else []

    def _stretch_note(self) -> Block:
        note = distorted(self.explanation.geometry.width, self.explanation.geometry.height)
        return [Line(note, 6.5)] if note else []


def _apart(block: Block) -> Block:
    """The same words, further away from what stands above them."""
    return [replace(item, space=APART) if not i and isinstance(item, Line) else item for i, item in enumerate(block)]


def _end(end: str | float) -> str:
    return end if isinstance(end, str) else wording.number(end)


def figure(
    explanation: Explanation,
    *,
    layout: str = "rows",
    scale: str = "entry",
    fixed: Sequence[float] | None = None,
    cmap: str = "magma",
    opacity: float = 0.6,
    grid: bool = False,
    peak: bool = True,
    box: bool = True,
    background: str = "picture",
    signed: bool = False,
    cells: bool = False,
) -> Figure:
    """All maps of an explanation side by side.

    Parameters
    ----------
    layout: "rows": the picture, then one row per entry and one column per method; a map that is the same for all
        entries is drawn once, beside the picture. "panels": picture, heat map and overlay of each entry and method.
    scale: which maps share the ends of the colour map: "entry" (each map its own), "caption" (one per method over all
        entries) or "fixed" (`fixed` = raw (low, high) for all). Raw minimum and maximum stand under every map.
    cmap: any matplotlib colour map. `opacity` of the heat, 0 to 1, the same everywhere.
    grid, peak, box: outlines of the patches; centre of the strongest patch; largest region above half of the range.
    background: "picture", or "edges" for its edges alone.
    signed: draw maps that have a sign with it, zero in the middle of a diverging colour map (`cmap` if it is one).
    cells: draw the coarse map as it is, one flat colour per patch, in place of one interpolated between them.

    What the model never saw is hatched, a map without evidence says so and has no colour. Raises OptionError, and
    GroundingError where the picture of a loaded explanation is gone.
    """
    style = Style(cmap, opacity, grid, peak, box, background, signed, cells)
    _check(layout, scale, fixed)
    limits = None if fixed is None else (float(fixed[0]), float(fixed[1]))
    return Comparison(explanation, style, cast(Scale, scale), limits, layout).draw()
