"""The figure of several explanations of one model: a row per image and class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from grounding.core import files
from grounding.core.errors import OptionError
from grounding.explanation import png
from grounding.explanation.explanation import Explanation
from grounding.explanation.figures import header, wording
from grounding.explanation.figures.explanation_panels import ExplanationPanels, caption_limits, drawn_maps
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.sheet import BROADEST, INK, Block, PanelGrid, Paragraph, Row, Sheet
from grounding.explanation.labels import origin_words

PANEL = (2.6, 2.1)  # inches that a panel must fit into
MOST_WARNINGS = 6
NAMED = 3  # images that a warning names
FIGURE = "figure.png"


def figure(explanations: Sequence[Explanation], **options: Any) -> Figure:
    """Draw the maps of several explanations in one figure, each row beside its image.

    `options` are those of `FigureOptions`; `layout` is ignored. With scale "caption" all images share one range per
    method. Raises OptionError, also for explanations of different models, methods or targets.
    """
    chosen = FigureOptions.of(options)
    if not explanations:
        raise OptionError("nothing to draw: no explanation was given")
    for name in ("methods", "model", "target"):
        if len({_compared(one, name) for one in explanations}) > 1:
            raise OptionError(f"explanations with different {name} cannot share a figure")
    return _draw(explanations, chosen)


def save(explanations: Sequence[Explanation], directory: str | Path, **options: Any) -> Path:
    """Write the figure into a folder, replacing an earlier one; return its path. Raises OptionError, OSError."""
    folder = files.check_output(directory, (FIGURE,))
    files.write_together(folder, {FIGURE: png.encode_figure(figure(explanations, **options))}, (FIGURE,))
    return folder / FIGURE


def _compared(explanation: Explanation, name: str) -> str:
    return str(list(explanation.methods)) if name == "methods" else str(getattr(explanation, name))


def _draw(explanations: Sequence[Explanation], options: FigureOptions) -> Figure:
    limits = caption_limits(explanations, options)
    grids = [_grid(one) for one in explanations]
    margin = grids[0].margin
    sheet = Sheet(max(header.NARROWEST, *(grid.width(grid.columns) + grid.margin for grid in grids)))
    y = header.place(sheet, _header(explanations, options), margin) + 2 * margin
    for one, grid in zip(explanations, grids, strict=True):
        y += sheet.rows(_rows(ExplanationPanels(one, options, grid.panel, limits)), grid, y)
    return sheet.figure(y + margin)


def _grid(explanation: Explanation) -> PanelGrid:
    geometry = explanation.geometry
    count = 1 + len(drawn_maps(explanation.methods.values()))
    width, height = PANEL
    empty = PanelGrid(PANEL, 1)
    usable = (BROADEST - empty.width(0)) / count - empty.gap
    across = min(width, usable, height * geometry.width / geometry.height)
    return PanelGrid((across, across * geometry.height / geometry.width), count)


def _rows(panels: ExplanationPanels) -> list[Row]:
    """One row per entry: label and maps; the image beside the first."""
    rows = []
    for entry in range(len(panels.explanation)):
        first = entry == 0
        overlays = [
            panels.overlay(method, entry, panels.heading(method, entry, view) if first else [], view)
            for method, view in drawn_maps(panels.explanation.methods.values())
        ]
        name = Paragraph(wording.name_of(panels.explanation.image.path), 8.0, INK, most=2)
        image = [panels.image()] if first else []
        rows.append(Row([name, *panels.label(entry, 4)], [*image, *overlays], first=1 - len(image)))
    return rows


def _header(explanations: Sequence[Explanation], options: FigureOptions) -> Block:
    first = explanations[0]
    same_origin = all(one.origin == first.origin for one in explanations)
    origin = [origin_words(first)] if same_origin and origin_words(first) else []
    facts = [f"{len(explanations)} images", wording.model_name(first.model), f"target {first.target}", *origin]
    return [
        Paragraph(" · ".join(facts), 9.0, INK, "bold"),
        *header.scale_and_legend(first, options),
        *header.warnings(_warnings(explanations)[:MOST_WARNINGS], 2),
    ]


def _warnings(explanations: Sequence[Explanation]) -> list[str]:
    """Every warning once; one that not all images have begins with the names of those that do."""
    names_of: dict[str, list[str]] = {}
    for one in explanations:
        for text in dict.fromkeys(one.warnings):
            names_of.setdefault(text, []).append(wording.name_of(one.image.path))
    merged = []
    for text, names in names_of.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        merged.append(text if len(names) == len(explanations) else f"{', '.join(names[:NAMED])}{more}: {text}")
    if len(merged) <= MOST_WARNINGS:
        return merged
    return [*merged[: MOST_WARNINGS - 1], f"and {len(merged) - MOST_WARNINGS + 1} more"]
