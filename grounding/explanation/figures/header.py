"""Header of a figure: caption, colour scale, legend and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from grounding.explanation.explanation import Explanation
from grounding.explanation.figures import fonts, wording
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.pixels import colour_table
from grounding.explanation.figures.sheet import ALERT, INK, Bar, Block, Paragraph, Sheet

NARROWEST, WIDEST = 6.5, 8.0  # inches of a sheet, and of the paragraphs of its header


def place(sheet: Sheet, block: Block, margin: float) -> float:
    """Add a header at the top of a sheet and return where it ends."""
    return margin + sheet.block(block, margin, margin, min(sheet.width - 2 * margin, WIDEST))


def caption(text: str, lines: int | None = None) -> list[Paragraph]:
    """The caption as a heading of at most `lines` lines; nothing for an empty caption."""
    return [Paragraph(f"“{text}”", 12.0, INK, "bold", lines)] if text else []


def scale_and_legend(explanation: Explanation, options: FigureOptions) -> list[Paragraph | Bar]:
    """The colour scale, the colour bars, and the meaning of the marks and scores."""
    notes = wording.legend(explanation, options), wording.score_note(explanation)
    return [
        Paragraph(wording.scale_note(explanation.methods.values(), options), space=0.06),
        *_colour_bars(explanation, options),
        *(Paragraph(note) for note in notes if note),
    ]


def _colour_bars(explanation: Explanation, options: FigureOptions) -> Iterator[Paragraph | Bar]:
    """One colour bar, or two with the titles of the methods that each belongs to."""
    plain, around = wording.drawn_around_zero(explanation.methods.values(), options)
    limits = options.limits
    ends = ("lowest", "highest") if limits is None else map(wording.number, limits)
    signed = ("against", "for") if limits is None else map(wording.number, wording.symmetric(limits))
    for methods, cmap, (low, high) in ((plain, options.cmap, ends), (around, options.diverging, signed)):
        if methods:
            if plain and around:
                yield Paragraph(wording.titles(methods) + ":", most=2, space=0.05)
            yield Bar(colour_table(cmap), low, high)


def warnings(
    texts: Iterable[str], lines: int | None = None, *, space: float = 0.0, ending: str = fonts.ELLIPSIS
) -> list[Paragraph]:
    """One paragraph per warning, cut after `lines` lines; `space` in inches above the first."""
    return [
        Paragraph(f"Warning: {text}", 7.5, ALERT, most=lines, space=0.0 if i else space, ending=ending)
        for i, text in enumerate(texts)
    ]
