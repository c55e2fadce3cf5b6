"""Several explanations in one figure: the same classes on several pictures, a row per picture and class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from matplotlib.figure import Figure

from grounding.core import files
from grounding.core.errors import OptionError
from grounding.explanation import png
from grounding.explanation.explanation import Explanation, MethodMaps
from grounding.explanation.figures import wording
from grounding.explanation.figures.comparison import Comparison
from grounding.explanation.figures.painter import Limits, limits_of
from grounding.explanation.figures.pixels import Style
from grounding.explanation.figures.sheet import ALERT, BROADEST, INK, Bar, Block, Grid, Line, Row, Sheet
from grounding.explanation.labels import next_best, origin_words
from grounding.explanation.maps import Scale

PANEL = (2.6, 2.1)  # inches that a panel must fit into
NARROWEST, WIDEST = 6.5, 8.0
MOST_WARNINGS = 6
# Pictures that a warning names.
NAMED = 3
FIGURE = "figure.png"


def figure(explanations: Sequence[Explanation], **options: Any) -> Figure:
    """All maps of several explanations below each other, each beside its picture; options as in
    `grounding.render.figure`, of which `layout` has no say. With scale "caption" all pictures share one range per
    method. Raises OptionError, also for explanations of different models or methods.
    """
    from grounding.explanation.figures.options import check_options

    options = {name: value for name, value in options.items() if name != "layout"}
    check_options(**options)
    if not explanations:
        raise OptionError("nothing to draw: no explanation was given")
    for what in ("columns", "model", "target"):
        if len({_compared(one, what) for one in explanations}) > 1:
            raise OptionError(f"explanations of different {what} cannot stand in one figure")
    scale, fixed = cast(Scale, options.pop("scale", "entry")), options.pop("fixed", None)
    style, limits = Style(**options), None if fixed is None else (float(fixed[0]), float(fixed[1]))
    members = [Member(one, style, scale, limits, "rows") for one in explanations]
    if scale == "caption":
        shared = _shared_limits(explanations, style, scale)
        members = [Member(one, style, scale, limits, "rows", shared) for one in explanations]
    return _draw(members)


def save(explanations: Sequence[Explanation], directory: str | Path, **options: Any) -> Path:
    """Write the figure of `figure` into a folder, which may hold an earlier one; returns its path. Raises OSError."""
    folder = files.check_output(directory, (FIGURE,))
    files.write_together(folder, {FIGURE: png.printed(figure(explanations, **options))}, (FIGURE,))
    return folder / FIGURE


def _compared(explanation: Explanation, what: str) -> str:
    return str(list(explanation.methods)) if what == "columns" else str(getattr(explanation, what))


def _shared_limits(explanations: Sequence[Explanation], style: Style, scale: Scale) -> dict[str, Limits]:
    return {
        key: limits_of([e.map(i, key) for e in explanations for i in range(len(e))], style, scale)
        for key in explanations[0].methods
    }


@dataclass
class Member(Comparison):
    """The rows of one picture; `shared` are the ends of the colour map that all pictures have."""

    shared: Mapping[str, Limits] = field(default_factory=dict)

    @cached_property
    def _grid(self) -> Grid:
        geometry, count = self.explanation.geometry, 1 + len(self.explanation.methods)
        width, height = PANEL
        usable = (BROADEST - Grid(PANEL, 1).width(0)) / count - Grid(PANEL, 1).gap
        across = min(width, usable, height * geometry.width / geometry.height)
        return Grid((across, across * geometry.height / geometry.width), count)

    def _limits(self, column: MethodMaps, entry: int) -> Limits:
        return self.shared[column.key] if self.shared else super()._limits(column, entry)

    @property
    def grid(self) -> Grid:
        """The measures of its rows."""
        return self._grid

    def rows(self) -> list[Row]:
        """One row per entry: what it is, its maps; the picture beside the first."""
        made = []
        for entry in range(len(self.explanation)):
            cells = [
                self._overlay_cell(column, entry, titled=not entry) for column in self.explanation.methods.values()
            ]
            image = [] if entry else [self._image_cell()]
            made.append(Row(self._label(entry), [*image, *cells], first=1 - len(image)))
        return made

    def words(self) -> Block:
        """What is the same for all: scale, colours, marks."""
        scale = wording.scale_note(self.explanation.methods.values(), self.style, self.scale, self.fixed)
        notes = (wording.legend(self.explanation, self.style), wording.score_note(self.explanation))
        return [Line(scale, space=0.06), *self._bars(), *(Line(note) for note in notes if note)]

    def _label(self, entry: int) -> Block:
        item = self.explanation.entries[entry]
        others = next_best(item)
        return [
            Line(wording.name_of(self.explanation.image.path), 8.0, INK, most=2),
            Line(self._titles[entry], 10.0, INK, "bold", 4),
            Line(wording.score_line(item)),
            *([Line(f"or: {others}", 6.5, most=2)] if others else []),
        ]


def _draw(members: Sequence[Member]) -> Figure:
    first = members[0].explanation
    wide = max(member.grid.width(member.grid.columns) + member.grid.margin for member in members)
    sheet = Sheet(max(NARROWEST, wide))
    margin = members[0].grid.margin
    warnings, origin = _warnings([member.explanation for member in members]), origin_words(first)
    same = all(member.explanation.origin == first.origin for member in members)
    words: list[Line | Bar] = [
        Line(
            f"{len(members)} pictures · model {first.model.get('id') or 'unnamed'} · target {first.target}"
            + (f" · {origin}" if origin and same else ""),
            9.0,
            INK,
            "bold",
        ),
        *members[0].words(),
        *(Line(f"Warning: {text}", 7.5, ALERT, most=2) for text in warnings[:MOST_WARNINGS]),
    ]
    y = margin + sheet.block(words, margin, margin, min(sheet.width - 2 * margin, WIDEST)) + 2 * margin
    for member in members:
        y += sheet.rows(member.rows(), member.grid, y)
    return sheet.figure(y + margin)


def _warnings(explanations: Sequence[Explanation]) -> list[str]:
    """Every warning once: by itself where all pictures have it, else with the names of those that do."""
    having: dict[str, list[str]] = {}
    for one in explanations:
        for text in dict.fromkeys(one.warnings):
            having.setdefault(text, []).append(wording.name_of(one.image.path))
    said = [
        text
        if len(names) == len(explanations)
        else f"{', '.join(names[:NAMED])}{_more(len(names) - NAMED, ' and')}: {text}"
        for text, names in having.items()
    ]
    return (
        said
        if len(said) <= MOST_WARNINGS
        else [*said[: MOST_WARNINGS - 1], f"and {len(said) - MOST_WARNINGS + 1} more"]
    )


def _more(count: int, word: str) -> str:
    return f"{word} {count} more" if count > 0 else ""
