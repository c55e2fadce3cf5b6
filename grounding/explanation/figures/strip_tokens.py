"""Tokens of a reading strip: their labels, positions and drawing. Lengths are inches, origin top-left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from grounding.core.geometry import Box
from grounding.explanation.explanation import Explanation
from grounding.explanation.figures import fonts
from grounding.explanation.figures.sheet import ALERT, QUIET, Paragraph, write
from grounding.explanation.labels import entry_title, is_blank, likelihood
from grounding.explanation.reading_order import peak_cell_of, right_to_left

# Dark enough for text on white, distinguishable for most readers, and none similar to ALERT.
COLOURS = ("#1d5fd1", "#13804a", "#c0207f", "#0a7f93", "#7a3cc8", "#6f7400")
BLANK_COLOUR = "#8a8a8a"
LABEL, NOTE = 10.5, 6.5  # points
WIDEST_LABEL = 1.1
IMPROBABLE = 0.5


@dataclass(frozen=True)
class Mark:
    """A token: its index among the entries, the texts below the image, and the `cell` of its peak.

    `cell` is (x0, y0, x1, y1) as fractions of the image, origin top-left; None for a map without evidence.
    """

    entry: int
    label: Paragraph
    notes: tuple[Paragraph, ...]
    cell: Box | None

    @property
    def width(self) -> float:
        """Width of the widest line."""
        lines = (self.label, *self.notes)
        return max(fonts.width_of(line.text, line.size, line.weight) for line in lines)


@dataclass(frozen=True)
class Placed:
    """A token on the sheet: centre `x` and `top` of its label, and the `frame` (x, y, width, height) of its image."""

    mark: Mark
    x: float
    top: float
    frame: tuple[float, float, float, float]
    fan: float  # height of the zone below the image where leader lines are slanted


def marks_of(explanation: Explanation, key: str, entries: Sequence[int], back: Sequence[int]) -> list[Mark]:
    """Marks of the tokens `entries` by method `key`; those in `back` are marked as behind an earlier token."""
    arrow = "back ›" if right_to_left(explanation.caption) else "‹ back"
    colours = cycle(COLOURS)
    made = []
    for entry in entries:
        item = explanation.entries[entry]
        cell = _cell(explanation, entry, key)
        colour = BLANK_COLOUR if is_blank(item.label) else next(colours)
        notes = [
            *([_percent(item.probability)] if item.probability is not None else []),
            *([Paragraph(arrow, NOTE, ALERT, "bold")] if entry in back else []),
            *([Paragraph(word, NOTE, ALERT) for word in ("no", "evidence")] if cell is None else []),
        ]
        text = fonts.wrap(entry_title(explanation, item), WIDEST_LABEL, LABEL, "bold", 1)
        label = Paragraph(text[0] if text else "?", LABEL, colour if cell else BLANK_COLOUR, "bold")
        made.append(Mark(entry, label, tuple(notes), cell))
    return made


def _percent(probability: float) -> Paragraph:
    if probability < IMPROBABLE:
        return Paragraph(f"{likelihood(probability)} ?", NOTE, ALERT, "bold")
    return Paragraph(likelihood(probability), NOTE, QUIET)


def _cell(explanation: Explanation, entry: int, key: str) -> Box | None:
    """The cell of an entry's peak, as fractions of the image."""
    cell = peak_cell_of(explanation, entry, key)
    box = None if cell is None else explanation.geometry.cell_box(*cell)
    if box is None:
        return None
    width, height = explanation.geometry.width, explanation.geometry.height
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def draw_marks(axes: Axes, key: str, placed: Sequence[Placed]) -> None:
    """Draw boxes, leader lines and labels, with the gids `cell:`, `leader:`, `token:` and `note:` + `<key>:<entry>`."""
    sharing = Counter(one.mark.cell for one in placed)
    turn: Counter[Box | None] = Counter()
    for one in placed:
        name = f"{key}:{one.mark.entry}"
        if one.mark.cell is not None:
            _draw_leader(axes, one, one.mark.cell, f"leader:{name}")
            _draw_cell(axes, one, one.mark.cell, (turn[one.mark.cell], sharing[one.mark.cell]), f"cell:{name}")
            turn[one.mark.cell] += 1
        y = one.top
        for number, line in enumerate((one.mark.label, *one.mark.notes)):
            write(axes, one.x, y, line.text, line, "center", f"{'note' if number else 'token'}:{name}")
            y += fonts.height_of(1, line.size)


def _draw_cell(axes: Axes, one: Placed, cell: Box, turn: tuple[int, int], gid: str) -> None:
    """Draw the outline of a cell. Tokens that share a cell alternate in dashes, so that all colours are visible."""
    left, top, width, height = one.frame
    x, y = left + cell[0] * width, top + cell[1] * height
    across, down = (cell[2] - cell[0]) * width, (cell[3] - cell[1]) * height
    number, among = turn
    dash = 5.0
    # A thinner line around a flat cell: the text inside must stay visible.
    stroke = min(1.5, max(0.5, 72 * min(across, down) / 5))
    if number == 0:
        under = Rectangle((x, y), across, down, fill=False, edgecolor="white", alpha=0.7, zorder=3)
        under.set_linewidth(1.7 * stroke)
        axes.add_patch(under)
    box = Rectangle((x, y), across, down, fill=False, edgecolor=one.mark.label.colour, linewidth=stroke, zorder=4)
    if among > 1:
        box.set_linestyle((-number * dash, (dash, (among - 1) * dash)))
    box.set_capstyle("butt")
    box.set_gid(gid)
    axes.add_patch(box)


def _draw_leader(axes: Axes, one: Placed, cell: Box, gid: str) -> None:
    left, top, width, height = one.frame
    x, bottom = left + (cell[0] + cell[2]) / 2 * width, top + height
    ys = [top + cell[3] * height, bottom, bottom + one.fan, one.top]
    line = Line2D([x, x, one.x, one.x], ys, color=one.mark.label.colour, linewidth=0.6, alpha=0.7, zorder=2)
    line.set_linestyle("solid")
    line.set_gid(gid)
    axes.add_line(line)
