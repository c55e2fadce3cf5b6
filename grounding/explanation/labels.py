"""What entries are called and how sure the model was of them, in words short enough for tables and figures."""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grounding.explanation.explanation import Entry, Explanation

BLANK = "␣"
ORIGINS = {"generated": "read by the model", "forced": "forced text", "predicted": "predicted by the model"}


def origin_words(explanation: Explanation) -> str:
    """Where the text is from: "read by the model" or "forced text"; empty for a text that was given."""
    return "" if explanation.origin == "given" else ORIGINS.get(explanation.origin, explanation.origin)


def is_blank(label: str) -> bool:
    """Whether nothing of a label would show: a space, or the end of the text, which is empty."""
    return not label.strip()


def shown(label: str) -> str:
    """A label that is nothing but spaces with a sign for each; all others as they are."""
    return BLANK * len(label) if label and not label.strip(" \u00a0") else label


def entry_title(explanation: Explanation, entry: Entry) -> str:
    """What an entry is called: its label, or words where the label alone would not say what is asked."""
    return title_in(explanation.caption, entry)


def title_in(caption: str, entry: Entry) -> str:
    """The same of an entry of this caption."""
    label = shown(entry.label) or ("(end)" if entry.kind in ("token", "where") else f"({entry.kind})")
    if entry.kind not in ("where", "contrast"):
        return label
    written = shown(caption[entry.start : entry.end])
    if written:
        return f"{label} {'in place of' if entry.kind == 'where' else 'at'} “{written}”"
    return f"{label} at the end" if entry.start >= len(caption) else f"{label} at sign {entry.start}"


def likelihood(probability: float) -> str:
    """A probability in percent, at most four signs: never 0% of what is possible, 100% only of what is certain."""
    if isnan(probability):
        return "?"
    if 0.995 <= probability < 1:
        return ">99%"
    if 0 < probability < 0.001:
        return "<0.1%"
    part = 100 * probability
    return f"{part:.1f}%" if 0 < part < 0.95 else f"{part:.0f}%"


def next_best(entry: Entry, most: int = 2) -> str:
    """The first `most` alternatives with their probabilities: `o 1%, c 0.4%`; empty where there are none."""
    found = entry.alternatives[:most]
    return ", ".join(f"{shown(one.label) or '(end)'} {likelihood(one.probability)}" for one in found)
