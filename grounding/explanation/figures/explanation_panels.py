"""Panels of one explanation: its image, heat maps and overlays with the text around each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from grounding.core.geometry import DETAIL, OVERVIEW
from grounding.explanation.explanation import Explanation, MethodMaps, PatchMap
from grounding.explanation.figures import wording
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.painter import Limits, Painter, has_evidence, limits_of
from grounding.explanation.figures.pixels import Segment, distorted, fit, grid_lines
from grounding.explanation.figures.sheet import ALERT, DPI, INK, Block, Panel, Paragraph
from grounding.explanation.labels import next_best

# Colour limits by method key and name of the view.
SharedLimits = Mapping[tuple[str, str], Limits]


def caption_limits(explanations: Sequence[Explanation], options: FigureOptions) -> dict[tuple[str, str], Limits]:
    """Colour limits over all entries of all explanations; empty unless the scale is "caption"."""
    if options.scale != "caption":
        return {}
    return {
        (key, view): limits_of([found for one in explanations for found in _maps(one, key, view)], options)
        for key in explanations[0].methods
        for view in (DETAIL, OVERVIEW)
    }


def _maps(explanation: Explanation, key: str, view: str) -> list[PatchMap]:
    maps = [explanation.map(i, key) for i in range(len(explanation))]
    return maps if view == DETAIL else [one.overview for one in maps if one.overview is not None]


def drawn_maps(methods: Iterable[MethodMaps]) -> list[tuple[MethodMaps, str]]:
    """Each method with the name of each view that it has maps of: the overview beside the detail."""
    views = [(m, v) for m in methods for v in (DETAIL, OVERVIEW)]
    return [(m, view) for m, view in views if view == DETAIL or m.overview is not None]


@dataclass
class ExplanationPanels:
    """Makes the panels of one explanation for panels of `inches` (width, height).

    `limits` are colour limits that several maps share; empty: each map has its own, or the fixed ones. Peak and box are
    marks of the detailed view alone.
    """

    explanation: Explanation
    options: FigureOptions
    inches: tuple[float, float]
    limits: SharedLimits

    @cached_property
    def _painter(self) -> Painter:
        geometry = self.explanation.geometry
        size = fit(geometry.width, geometry.height, round(max(self.inches) * DPI * self.options.oversampling))
        return Painter(self.explanation.image.pil, geometry, size, self.options, grid=False)

    @cached_property
    def _overview_painter(self) -> Painter:
        assert self.explanation.overview is not None
        unmarked = replace(self.options, peak=False, box=False)
        size = self._painter.size
        return Painter(self.explanation.image.pil, self.explanation.overview, size, unmarked, grid=False)

    @cached_property
    def _titles(self) -> list[str]:
        return wording.entry_titles(self.explanation)

    def image(self, *, headed: bool = True) -> Panel:
        """The image."""
        note = distorted(self.explanation.geometry.width, self.explanation.geometry.height)
        above = _column_heading("Image") if headed else []
        return Panel(self._painter.image, "image", above, [Paragraph(note, 6.5)] if note else [])

    def overlay(self, method: MethodMaps, entry: int, above: Block = (), view: str = DETAIL) -> Panel:
        """One map of a view over the image, with the text `above`."""
        found, limits = self._map(method, entry, view), self._limits(method, entry, view)
        painter = self._painter if view == DETAIL else self._overview_painter
        name = f"{'overlay' if view == DETAIL else view}:{method.key}:{entry}"
        return Panel(
            painter.overlay(found, limits), name, above, self._below(found, limits), self._lines(found, limits)
        )

    def triple(self, method: MethodMaps, entry: int, *, headed: bool) -> list[Panel]:
        """Image, heat map and overlay of one map, and the overlay of the overview; `headed`: with headings above."""
        found, limits = self._map(method, entry), self._limits(method, entry)
        name, lines = f"{method.key}:{entry}", self._lines(found, limits)
        heat, overlay = self._painter.heat(found, limits), self._painter.overlay(found, limits)
        headings = [_column_heading(text) if headed else [] for text in ("Heat map", "Overlay", "Overview")]
        beside = [self.overlay(method, entry, headings[2], OVERVIEW)] if method.overview is not None else []
        return [
            self.image(headed=headed),
            Panel(heat, f"heat:{name}", headings[0], self._below(found, limits), lines),
            Panel(overlay, f"overlay:{name}", headings[1], lines=lines),
            *beside,
        ]

    def label(self, entry: int, lines: int = 6) -> list[Paragraph]:
        """Title (at most `lines` lines), score and next best alternatives of an entry."""
        item = self.explanation.entries[entry]
        others = next_best(item)
        return [
            Paragraph(self._titles[entry], 10.0, INK, "bold", lines),
            Paragraph(wording.score_line(item)),
            *([Paragraph(f"or: {others}", 6.5, most=2)] if others else []),
        ]

    def heading(self, method: MethodMaps, entry: int, view: str = DETAIL) -> list[Paragraph]:
        """Title, layer, changed options, shared map and shared scale of a method; of an overview, title and scale."""
        options, limits = wording.changed_options(method), self._limits(method, entry, view)
        shared_scale = self.options.scale == "caption" and limits[0] < limits[1]
        note = wording.shared_note(self.explanation) if method.shared else ""
        if view != DETAIL:
            return [
                Paragraph(method.title, 9.0, INK, "bold", 2),
                Paragraph(view, 7.0, INK),
                *([Paragraph(f"scale {wording.span(limits)}")] if shared_scale else []),
            ]
        return [
            Paragraph(method.title, 9.0, INK, "bold", 2),
            *([Paragraph(wording.short_layer(method.layer), 6.5, most=3)] if method.layer else []),
            *([Paragraph(options, 6.5, most=3)] if options else []),
            *([Paragraph(note, 7.0, ALERT)] if note else []),
            *([Paragraph(f"scale {wording.span(limits)}")] if shared_scale else []),
        ]

    def _map(self, method: MethodMaps, entry: int, view: str = DETAIL) -> PatchMap:
        found = self.explanation.map(entry, method.key)
        return found if view == DETAIL or found.overview is None else found.overview

    def _limits(self, method: MethodMaps, entry: int, view: str = DETAIL) -> Limits:
        if self.limits:
            return self.limits[method.key, view]
        return limits_of([self._map(method, entry, view)], self.options)

    def _below(self, found: PatchMap, limits: Limits) -> Block:
        low, _ = found.range
        raw = Paragraph(f"raw {wording.span(found.range)}" if low == low else "raw: none seen", 6.5)
        if has_evidence(found, limits):
            cut = wording.clipping(found, self.options, limits) if self.options.scale == "fixed" else ""
            return [raw, *([Paragraph(cut, 6.5, ALERT)] if cut else [])]
        reason = found.status.reason or "a single value: no range to draw"
        return [Paragraph(f"no evidence: {reason}", 7.0, ALERT), raw]

    def _lines(self, found: PatchMap, limits: Limits) -> list[Segment]:
        return grid_lines(found.geometry) if self.options.grid and has_evidence(found, limits) else []


def _column_heading(text: str) -> list[Paragraph]:
    return [Paragraph(text, 9.0, INK, "bold")]
