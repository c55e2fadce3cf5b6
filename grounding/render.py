"""Pictures of an explanation: one map over its picture, and the figure with all of them side by side.

No pyplot: nothing global is touched, no window system is needed, and the same explanation gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from grounding.drawing import Background, Style, colour_table, fit
from grounding.errors import OptionError
from grounding.explanation import EntryMap, Explanation, MapColumn
from grounding.images import Picture
from grounding.lettering import printable
from grounding.maps import SCALES, Scale
from grounding.page import ALERT, DPI, INK, QUIET, Bar, Block, Cell, Grid, Line, Row, Sheet
from grounding.panel import Limits, Painter, limits_of, with_sign
from grounding.registry import did_you_mean

LAYOUTS = ("rows", "panels")
MOST_WARNINGS = 8
NARROWEST = 6.5  # inches: room for the words above
BESIDE = 3.4  # inches to the right of the picture from which the words stand there and not above it
SHARED_NOTE = "does not see the text: one map for all entries"
# Panels hold more pixels than the figure shows at its own resolution, so that print at 300 dpi stays sharp.
OVERSAMPLING = 2


def overlay(
    entry_map: EntryMap,
    picture: Picture | Image.Image,
    *,
    limits: Limits | None = None,
    longest: int | None = None,
    **style: Any,
) -> Image.Image:
    """One map over its picture, RGB, at the picture's size or with `longest` pixels on its longer side at most.

    Parameters
    ----------
    picture: the upright picture that the map belongs to.
    limits: raw values at the two ends of the colour map; default the map's own lowest and highest.
    style: cmap, opacity, grid, peak, box, background, signed, as in `figure`.

    A map without evidence gives the picture in grey, marked so. Raises OptionError.
    """
    image = picture if isinstance(picture, Image.Image) else picture.image
    size = (image.height, image.width)
    if longest is not None and max(size) > longest:
        size = fit(image.width, image.height, longest, stretch=float("inf"))
    chosen = Style(**style)
    painter = Painter(image, entry_map.geometry, size, chosen)
    return Image.fromarray(painter.overlay(entry_map, limits or limits_of([entry_map], chosen)))


def figure(
    explanation: Explanation,
    *,
    layout: str = "rows",
    scale: Scale = "entry",
    fixed: Limits | None = None,
    cmap: str = "magma",
    opacity: float = 0.6,
    grid: bool = False,
    peak: bool = True,
    box: bool = True,
    background: Background = "picture",
    signed: bool = False,
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

    What the model never saw is hatched, a map without evidence says so and has no colour. Raises OptionError, and
    GroundingError where the picture of a loaded explanation is gone.
    """
    _check(layout, scale, fixed)
    style = Style(cmap, opacity, grid, peak, box, background, signed)
    made = _Figure(explanation, style, scale, fixed, layout)
    return made.draw()


def _check(layout: str, scale: str, fixed: Limits | None) -> None:
    for what, name, known in (("layout", layout, LAYOUTS), ("scale", scale, SCALES)):
        if name not in known:
            raise OptionError(f"unknown {what} {name!r}{did_you_mean(name, list(known))} (there are: {', '.join(known)})")
    if scale == "fixed" and (fixed is None or len(fixed) != 2 or not fixed[0] < fixed[1]):
        raise OptionError(f"scale 'fixed' needs its limits, low < high; got {fixed}")
    if scale != "fixed" and fixed is not None:
        raise OptionError(f"fixed limits {fixed} are only for scale 'fixed', not for {scale!r}")


@dataclass
class _Figure:
    """One figure in the making."""

    explanation: Explanation
    style: Style
    scale: Scale
    fixed: Limits | None
    layout: str

    @cached_property
    def shared(self) -> list[MapColumn]:
        return [c for c in self.explanation.columns.values() if c.shared]

    @cached_property
    def own(self) -> list[MapColumn]:
        return [c for c in self.explanation.columns.values() if not c.shared]

    @cached_property
    def single(self) -> bool:
        """One entry: the picture and all of its maps fit one row."""
        return len(self.explanation.entries) == 1

    @cached_property
    def grid(self) -> Grid:
        geometry = self.explanation.geometry
        if self.layout == "panels":
            columns, rows = 3, len(self.explanation.entries) * len(self.own) + len(self.shared)
        elif self.single:
            columns, rows = 1 + len(self.own) + len(self.shared), 1
        else:
            columns, rows = max(1 + len(self.shared), len(self.own)), 1 + len(self.explanation.entries)
        height, width = fit(geometry.width, geometry.height, 1000)
        # Square inches of a panel: smaller where there are many.
        area = 4.6 if rows <= 4 and columns <= 4 else 3.4 if rows <= 10 else 2.6
        factor = min(sqrt(area / (width * height)), 4.6 / width, 3.8 / height)
        return Grid((width * factor, height * factor), columns)

    @cached_property
    def painter(self) -> Painter:
        longest = round(max(self.grid.panel) * DPI * OVERSAMPLING)
        geometry = self.explanation.geometry
        size = fit(geometry.width, geometry.height, longest)
        return Painter(self.explanation.picture.image, geometry, size, self.style)

    def draw(self) -> Figure:
        grid = self.grid
        width = max(NARROWEST, grid.left(grid.columns) - grid.gap + grid.margin)
        sheet, words, rows = Sheet(width), self.words(), list(self.rows())
        y = grid.margin
        beside = grid.left(1 + len(self.shared))
        if self.layout == "rows" and not self.single and width - grid.margin - beside >= BESIDE:
            above = sheet.rows(rows[:1], grid, y)
            text = sheet.block(words, beside + 0.1, y, min(width - grid.margin - beside - 0.1, 6.0))
            y += max(above, text + grid.gap) + sheet.rows(rows[1:], grid, y + max(above, text + grid.gap))
        else:
            y += sheet.block(words, grid.margin, y, min(width - 2 * grid.margin, 9.0)) + grid.gap
            y += sheet.rows(rows, grid, y)
        return sheet.figure(y - grid.gap + grid.margin)

    def words(self) -> Block:
        """What stands once in the figure: caption, model, scale, legend, warnings."""
        explanation = self.explanation
        target = explanation.target + (f" ({explanation.token_target})" if explanation.token_target else "")
        score = [] if explanation.score is None else [f"score {_number(explanation.score)}"]
        facts = [f"model {explanation.model.get('id') or 'unnamed'}", f"target {target}", *score]
        caption = [Line(f"“{explanation.caption}”", 12, INK, "bold", 5)] if explanation.caption else []
        block = [*caption, Line(" · ".join(facts), 8, INK, most=4), Line(self.scale_note()), *self.bars()]
        block.append(Line(self.legend()))
        warnings = explanation.warnings
        block += [Line(f"Warning: {text}", 8, ALERT, most=12) for text in warnings[:MOST_WARNINGS]]
        if len(warnings) > MOST_WARNINGS:
            block.append(Line(f"and {len(warnings) - MOST_WARNINGS} more warnings: see the JSON", 8, ALERT))
        return block

    def scale_note(self) -> str:
        text = {
            "entry": "Scale per entry: each map from its own lowest to its own highest value; compare the raw numbers",
            "caption": "Scale per caption: one range per method over all entries, given above its maps",
            "fixed": f"Scale fixed: the same range for all maps{_range(self.fixed) if self.fixed else ''}",
        }[self.scale]
        signed = any(c.signed for c in self.explanation.columns.values())
        if signed and not self.style.signed:
            text += "; negative values are drawn as zero"
        return text + "."

    def bars(self) -> Iterator[Bar]:
        low, high = ("lowest", "highest") if self.fixed is None else map(_number, self.fixed)
        columns = self.explanation.columns.values()
        if any(not (c.signed and self.style.signed) for c in columns):
            yield Bar(colour_table(self.style.cmap), low, high)
        if any(c.signed and self.style.signed for c in columns):
            ends = ("against, as strong", "for") if self.fixed is None else (low, high)
            yield Bar(colour_table(self.style.diverging), *ends)

    def legend(self) -> str:
        unseen = self.explanation.geometry.seen_fraction < 1
        parts = [
            *(["◉ strongest patch"] if self.style.peak else []),
            *(["□ largest region above half of the range"] if self.style.box else []),
            *(["▨ not seen by the model"] if unseen else []),
        ]
        texts = [self.explanation.caption, *(e.label for e in self.explanation.entries), *self.explanation.warnings]
        if any("\\" in printable(t, "bold") and "\\" not in t for t in texts):
            parts.append(r"\u.. or \x..: a character that cannot be drawn here")
        return "   ".join(parts)

    def rows(self) -> Iterator[Row]:
        if self.layout == "panels":
            yield from self.triples()
        elif self.single:
            cells = [self.overlay_cell(c, 0, titled=True) for c in self.explanation.columns.values()]
            yield Row(self.entry_label(0), [self.picture_cell(), *cells])
        else:
            cells = [self.overlay_cell(c, 0, titled=True) for c in self.shared]
            yield Row(self.picture_label(), [self.picture_cell(), *cells])
            for entry in range(len(self.explanation.entries)):
                yield Row(
                    self.entry_label(entry), [self.overlay_cell(c, entry, titled=entry == 0) for c in self.own]
                )

    def triples(self) -> Iterator[Row]:
        """picture | heat map | overlay: maps for all entries first, then entry by entry."""
        jobs = [(c, 0) for c in self.shared] + [(c, e) for e in range(len(self.explanation.entries)) for c in self.own]
        for number, (column, entry) in enumerate(jobs):
            titles = [[Line(t, 9, INK, "bold")] if number == 0 else [] for t in ("Picture", "Heat map", "Overlay")]
            found = self.map(column, entry)
            limits = self.limits(column, entry)
            name = f"{column.key}:{entry}"
            label = [Line("all entries", 10, INK, "bold")] if column.shared else self.entry_label(entry)
            yield Row(
                [*label, *self.column_lines(column)],
                [
                    Cell(self.painter.picture, "picture", titles[0], self.stretch_note()),
                    Cell(self.painter.heat(found, limits), f"heat:{name}", titles[1], self.below(found)),
                    Cell(self.painter.overlay(found, limits), f"overlay:{name}", titles[2]),
                ],
            )

    def map(self, column: MapColumn, entry: int) -> EntryMap:
        return self.explanation.map(entry, column.key)

    def limits(self, column: MapColumn, entry: int) -> Limits:
        sharing = range(len(self.explanation.entries)) if self.scale == "caption" and not column.shared else [entry]
        return limits_of([self.map(column, e) for e in sharing], self.style, self.scale, self.fixed)

    def picture_label(self) -> Block:
        geometry = self.explanation.geometry
        block = [Line("picture", 10, INK, "bold"), Line(f"{geometry.width} x {geometry.height} pixels")]
        if geometry.seen_fraction < 1:
            block.append(Line(f"the model saw {_percent(geometry.seen_fraction)} of it"))
        return block

    def entry_label(self, entry: int) -> Block:
        item = self.explanation.entries[entry]
        return [
            Line(item.label or f"({item.kind})", 10, INK, "bold", 6),
            Line(f"{item.kind} · score {_number(item.score)}"),
        ]

    def column_lines(self, column: MapColumn, *, titled: bool = True) -> list[Line]:
        layer = [Line(f"at {column.layer}", 6.5, most=2)] if column.layer else []
        note = [Line(SHARED_NOTE, 7, ALERT)] if column.shared else []
        return [Line(column.title, 9, INK, "bold", 2), *layer, *note] if titled else []

    def picture_cell(self) -> Cell:
        return Cell(self.painter.picture, "picture", [Line("Picture", 9, INK, "bold")], self.stretch_note())

    def overlay_cell(self, column: MapColumn, entry: int, *, titled: bool) -> Cell:
        found, limits = self.map(column, entry), self.limits(column, entry)
        above = self.column_lines(column, titled=titled)
        if titled and self.scale == "caption" and limits[0] < limits[1]:
            above.append(Line(f"scale{_range(limits)}"))
        return Cell(self.painter.overlay(found, limits), f"overlay:{column.key}:{entry}", above, self.below(found))

    def below(self, found: EntryMap) -> Block:
        low, high = found.range
        raw = Line(f"raw{_range((low, high))}" if low == low else "raw: none seen", 6.5)
        if found.status and low < high:
            return [raw]
        reason = found.status.reason or "a single value: no range to draw"
        return [Line(f"no evidence: {reason}", 7, ALERT), raw]

    def stretch_note(self) -> Block:
        geometry = self.explanation.geometry
        ratio = geometry.width / geometry.height
        return [] if 1 / 8 <= ratio <= 8 else [Line("drawn wider than it is" if ratio < 1 else "drawn higher than it is", 6.5)]


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _range(limits: Limits) -> str:
    return f" {_number(limits[0])} to {_number(limits[1])}"


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.01 else "less than 1%"
