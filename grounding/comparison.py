"""What stands where in the figure: the picture, a row per entry, a column per method, and the words around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, sqrt

from matplotlib.figure import Figure

from grounding.drawing import STRETCH, Style, colour_table, fit
from grounding.explanation import EntryMap, Explanation, MapColumn
from grounding.lettering import printable
from grounding.maps import Scale
from grounding.page import ALERT, DPI, INK, Bar, Block, Cell, Grid, Line, Row, Sheet
from grounding.panel import Limits, Painter, has_evidence, limits_of

MOST_WARNINGS = 8
NARROWEST = 6.5  # inches: room for the words above
WIDEST = 8.0  # inches of a paragraph
BESIDE = 3.4  # inches to the right of the picture from which the words stand there and not above it
LONGEST_BLOCK = 8  # rows that always stand in one block
BETWEEN_BLOCKS = 0.15
SLIMMEST, BROADEST = 1.5, 16.0  # height : width of the blocks together, and their width in inches
SHARED_NOTE = "does not see the text: one map for all entries"
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
    def _shared(self) -> list[MapColumn]:
        return [c for c in self.explanation.columns.values() if c.shared]

    @cached_property
    def _own(self) -> list[MapColumn]:
        return [c for c in self.explanation.columns.values() if not c.shared]

    @cached_property
    def _single(self) -> bool:
        """One entry: the picture and all of its maps fit one row."""
        return len(self.explanation.entries) == 1

    @cached_property
    def _grid(self) -> Grid:
        geometry = self.explanation.geometry
        if self.layout == "panels":
            columns, rows = 3, len(self.explanation.entries) * len(self._own) + len(self._shared)
        elif self._single:
            columns, rows = 1 + len(self._own) + len(self._shared), 1
        else:
            columns, rows = max(1 + len(self._shared), len(self._own)), 1 + len(self.explanation.entries)
        height, width = fit(geometry.width, geometry.height, 1000)
        # Square inches of a panel: smaller where there are many.
        area = 4.6 if rows <= 4 and columns <= 4 else 3.4 if rows <= 10 else 2.6
        factor = min(sqrt(area / (width * height)), 4.6 / width, 3.8 / height)
        return Grid((width * factor, height * factor), columns)

    @cached_property
    def _painter(self) -> Painter:
        longest = round(max(self._grid.panel) * DPI * OVERSAMPLING)
        geometry = self.explanation.geometry
        size = fit(geometry.width, geometry.height, longest)
        return Painter(self.explanation.picture.image, geometry, size, self.style)

    def draw(self) -> Figure:
        """The figure."""
        grid, rows = self._grid, list(self._rows())
        banded = self.layout == "rows" and not self._single
        band, rows = (rows[:1], rows[1:]) if banded else ([], rows)
        columns = len(self._own) if banded else grid.columns
        across = grid.width(columns) + BETWEEN_BLOCKS
        blocks = self._blocks(rows, across)
        width = max(across * len(blocks) - BETWEEN_BLOCKS, grid.width(1 + len(self._shared)) if band else 0.0)
        sheet = Sheet(max(NARROWEST, width - grid.gap + 2 * grid.margin))
        y = self._top(sheet, band)
        depths = [sheet.rows(block, replace(grid, start=number * across), y) for number, block in enumerate(blocks)]
        return sheet.figure(y + max(depths, default=0.0) - grid.gap + grid.margin)

    def _top(self, sheet: Sheet, band: list[Row]) -> float:
        """Write the words, beside the band where there is room; return where the rows begin."""
        grid, words = self._grid, self._words()
        left = grid.left(1 + len(self._shared)) + 0.1
        room = sheet.width - grid.margin - left
        if band and room >= BESIDE:
            text = sheet.block(words, left, grid.margin, min(room, WIDEST)) + grid.gap
            return grid.margin + max(text, sheet.rows(band, grid, grid.margin))
        y = grid.margin + sheet.block(words, grid.margin, grid.margin, min(sheet.width - 2 * grid.margin, WIDEST))
        return y + grid.gap + sheet.rows(band, grid, y + grid.gap)

    def _blocks(self, rows: list[Row], width: float) -> list[list[Row]]:
        """Many rows stand in several blocks side by side, read downwards, so that the sheet does not become a strip."""
        count = 1
        if len(rows) > LONGEST_BLOCK:
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
        target = explanation.target + (f" ({explanation.token_target})" if explanation.token_target else "")
        score = [] if explanation.score is None else [f"score {_number(explanation.score)}"]
        facts = [f"model {explanation.model.get('id') or 'unnamed'}", f"target {target}", *score]
        caption = [Line(f"“{explanation.caption}”", 12.0, INK, "bold", 5)] if explanation.caption else []
        block: list[Line | Bar] = [
            *caption,
            Line(" · ".join(facts), 8.0, INK, most=4),
            Line(self._scale_note(), space=0.06),
            *self._bars(),
        ]
        block.append(Line(self._legend()))
        warnings = explanation.warnings
        block += [
            Line(f"Warning: {text}", 7.5, ALERT, most=12, space=0.0 if i else 0.06)
            for i, text in enumerate(warnings[:MOST_WARNINGS])
        ]
        if len(warnings) > MOST_WARNINGS:
            block.append(Line(f"and {len(warnings) - MOST_WARNINGS} more warnings: see the JSON", 7.5, ALERT))
        return block

    def _scale_note(self) -> str:
        text = {
            "entry": "Scale per entry: each map from its own lowest to its own highest value; compare the raw numbers",
            "caption": "Scale per caption: one range per method over all entries, given with its name",
            "fixed": f"Scale fixed: the same range for all maps,{_range(self.fixed or (0.0, 0.0))}",
        }[self.scale]
        signed = any(c.signed for c in self.explanation.columns.values())
        if signed and not self.style.signed:
            text += "; negative values are drawn as zero"
        return text + "."

    def _bars(self) -> Iterator[Bar]:
        low, high = ("lowest", "highest") if self.fixed is None else map(_number, self.fixed)
        columns = self.explanation.columns.values()
        if any(not (c.signed and self.style.signed) for c in columns):
            yield Bar(colour_table(self.style.cmap), low, high)
        if any(c.signed and self.style.signed for c in columns):
            ends = ("against", "for") if self.fixed is None else (low, high)
            yield Bar(colour_table(self.style.diverging), *ends)

    def _legend(self) -> str:
        unseen = self.explanation.geometry.seen_fraction < 1
        parts = [
            *(["◉ strongest patch"] if self.style.peak else []),
            *(["□ largest region above half of the range"] if self.style.box else []),
            *(["▨ not seen by the model"] if unseen else []),
        ]
        texts = [self.explanation.caption, *(e.label for e in self.explanation.entries), *self.explanation.warnings]
        if any("\\" in printable(t, "bold") and "\\" not in t for t in texts):
            parts.append(r"\u.. or \x..: a character that cannot be drawn here")
        return " · ".join(parts)

    def _rows(self) -> Iterator[Row]:
        if self.layout == "panels":
            yield from self._triples()
        elif self._single:
            cells = [self._overlay_cell(c, 0, titled=True) for c in self.explanation.columns.values()]
            yield Row(self._entry_label(0), [self._picture_cell(), *cells])
        else:
            cells = [self._overlay_cell(c, 0, titled=True) for c in self._shared]
            yield Row(self._picture_label(), [self._picture_cell(), *cells])
            for entry in range(len(self.explanation.entries)):
                yield Row(
                    self._entry_label(entry), [self._overlay_cell(c, entry, titled=entry == 0) for c in self._own]
                )

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
            label = [Line("all entries", 10.0, INK, "bold")] if column.shared else self._entry_label(entry)
            yield Row(
                [*label, *self._column_lines(column, limits)],
                [
                    Cell(self._painter.picture, "picture", titles[0], self._stretch_note()),
                    Cell(self._painter.heat(found, limits), f"heat:{name}", titles[1], self._below(found, limits)),
                    Cell(self._painter.overlay(found, limits), f"overlay:{name}", titles[2]),
                ],
            )

    def _map(self, column: MapColumn, entry: int) -> EntryMap:
        return self.explanation.map(entry, column.key)

    def _limits(self, column: MapColumn, entry: int) -> Limits:
        if self.scale == "caption":
            return self._caption_limits[column.key]
        return limits_of([self._map(column, entry)], self.style, self.scale, self.fixed)

    @cached_property
    def _caption_limits(self) -> dict[str, Limits]:
        entries = range(len(self.explanation.entries))
        return {
            key: limits_of([self._map(column, e) for e in entries], self.style, self.scale)
            for key, column in self.explanation.columns.items()
        }

    def _picture_label(self) -> Block:
        geometry = self.explanation.geometry
        block = [Line("all entries", 10.0, INK, "bold")] if self._shared else []
        block.append(Line(f"{geometry.width} x {geometry.height} pixels"))
        if geometry.seen_fraction < 1:
            block.append(Line(f"the model saw {_percent(geometry.seen_fraction)} of it"))
        return block

    def _entry_label(self, entry: int) -> Block:
        item = self.explanation.entries[entry]
        return [
            Line(item.label or f"({item.kind})", 10.0, INK, "bold", 6),
            Line(f"{item.kind} · score {_number(item.score)}"),
        ]

    def _column_lines(self, column: MapColumn, limits: Limits) -> list[Line]:
        layer = [Line(column.layer, 6.5, most=3)] if column.layer else []
        note = [Line(SHARED_NOTE, 7.0, ALERT)] if column.shared else []
        scale = [Line(f"scale{_range(limits)}")] if self.scale == "caption" and limits[0] < limits[1] else []
        return [Line(column.title, 9.0, INK, "bold", 2), *layer, *note, *scale]

    def _picture_cell(self) -> Cell:
        return Cell(self._painter.picture, "picture", [Line("Picture", 9.0, INK, "bold")], self._stretch_note())

    def _overlay_cell(self, column: MapColumn, entry: int, *, titled: bool) -> Cell:
        found, limits = self._map(column, entry), self._limits(column, entry)
        above = self._column_lines(column, limits) if titled else []
        return Cell(
            self._painter.overlay(found, limits), f"overlay:{column.key}:{entry}", above, self._below(found, limits)
        )

    def _below(self, found: EntryMap, limits: Limits) -> Block:
        low, high = found.range
        raw = Line(f"raw{_range((low, high))}" if low == low else "raw: none seen", 6.5)
        if has_evidence(found, limits):
            return [raw]
        reason = found.status.reason or "a single value: no range to draw"
        return [Line(f"no evidence: {reason}", 7.0, ALERT), raw]

    def _stretch_note(self) -> Block:
        geometry = self.explanation.geometry
        ratio = geometry.width / geometry.height
        return (
            []
            if 1 / STRETCH <= ratio <= STRETCH
            else [Line(f"drawn {'wider' if ratio < 1 else 'higher'} than it is", 6.5)]
        )


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _range(limits: Limits) -> str:
    return f" {_number(limits[0])} to {_number(limits[1])}"


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.01 else "less than 1%"
