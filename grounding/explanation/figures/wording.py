"""The words of the figure: what is said of picture, scale, marks, scores and columns. Plain text, no layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import floor
from typing import Any

from grounding.core.errors import GroundingError
from grounding.explanation.explanation import Entry, Explanation, MethodMaps, PatchMap
from grounding.explanation.figures.fonts import printable
from grounding.explanation.figures.painter import Limits, clipped
from grounding.explanation.figures.pixels import Style
from grounding.explanation.labels import entry_title, origin_words
from grounding.explanation.maps import Scale

LONGEST_NAME = 60
SCALARS = {"log_probability": "log-probability"}


def number(value: float) -> str:
    """Three digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")


def span(limits: Limits) -> str:
    """low to high."""
    return f"{number(limits[0])} to {number(limits[1])}"


def percent(fraction: float) -> str:
    """Of something that is there: never 0%, and 100% only for all of it."""
    return f"{floor(100 * fraction)}%" if fraction >= 0.01 else "less than 1%"


def name_of(path: str | None) -> str:
    """The last part of a picture's path or address, shortened in its middle: enough to find the file again."""
    path = (path or "").rstrip("\\/")
    name = re.split(r"[\\/]", path)[-1] or "picture from memory"
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def facts(explanation: Explanation) -> str:
    """Picture, model, where the text is from, target and score in one line."""
    geometry, origin = explanation.geometry, origin_words(explanation)
    how = f" ({explanation.token_target})" if explanation.token_target else ""
    parts = [
        f"{name_of(explanation.image.path)}, {geometry.width} x {geometry.height} pixels",
        f"model {explanation.model.get('id') or 'unnamed'}",
        *([origin] if origin else []),
        f"target {explanation.target}{how}",
        *([] if explanation.score is None else [f"score {number(explanation.score)}"]),
    ]
    return " · ".join(parts)


def drawn_around_zero(columns: Iterable[MethodMaps], style: Style) -> tuple[list[MethodMaps], list[MethodMaps]]:
    """The columns drawn from low to high, and those drawn around zero."""
    chosen = list(columns)
    return [c for c in chosen if not (style.signed and c.signed)], [c for c in chosen if style.signed and c.signed]


def symmetric(limits: Limits) -> Limits:
    """Fixed limits as a map around zero has them."""
    reach = max(map(abs, limits))
    return -reach, reach


def scale_note(columns: Iterable[MethodMaps], style: Style, scale: Scale, fixed: Limits | None) -> str:
    """Which values have the ends of the colour map, and what becomes of negative ones."""
    plain, around = drawn_around_zero(columns, style)
    middle = "zero in the middle"
    if scale == "fixed" and fixed is not None:
        text = f"Scale fixed: all maps from {span(symmetric(fixed) if around and not plain else fixed)}"
        extra = f"signed ones from {span(symmetric(fixed))}" if plain else middle
    elif scale == "caption":
        text = "Scale per caption: one range per method over all entries, given with its name"
        extra = f"{middle} of signed ones" if plain else middle
    elif plain:
        text = "Scale per entry: each map from its own lowest to its own highest value"
        extra = "a signed one equally far on both sides of zero"
    else:
        text, extra = "Scale per entry: each map out to its own largest value, on both sides of zero", middle
    parts = [f"{text}, {extra}" if around else text]
    if scale == "entry":
        parts.append("compare the raw numbers")
    if any(c.signed for c in plain):
        parts.append("negative values are drawn as zero")
    if around and style.diverging != style.cmap != Style.cmap:
        parts.append(f"{style.cmap} has no middle: signed maps have {style.diverging}")
    return "; ".join(parts) + "."


def titles(columns: Iterable[MethodMaps]) -> str:
    """The names of methods, each once."""
    return ", ".join(dict.fromkeys(c.title for c in columns))


def legend(explanation: Explanation, style: Style) -> str:
    """What the marks mean, those that occur."""
    seen = explanation.geometry.seen_fraction
    outside = " (may miss the strongest patch)" if style.peak else ""
    parts = [
        *(["○ strongest patch"] if style.peak else []),
        *([f"□ largest region above half the range{outside}"] if style.box else []),
        *(["one colour per patch, nothing interpolated"] if style.cells else []),
        *([f"▨ unseen by the model: {percent(1 - seen)}"] if seen < 1 else []),
    ]
    others = [one.label for e in explanation.entries for one in e.alternatives]
    texts = [explanation.caption, *(e.label for e in explanation.entries), *others, *explanation.warnings]
    if any("\\" in printable(t, "bold") and "\\" not in t for t in texts):
        parts.append(r"\u.. or \x..: a character that cannot be drawn here")
    return " · ".join(parts)


def score_note(explanation: Explanation) -> str:
    """What the score of a part of the caption means; empty where there is none."""
    if any(entry.kind == "class" for entry in explanation.entries):
        return "Score of a class: its logit."
    if explanation.origin != "given":
        return _written_score(explanation)
    parts = [k for k in ("token", "word", "phrase") if any(e.kind == k for e in explanation.entries)]
    # A phrase is a text of its own, whatever becomes of the others.
    left_out = [k for k in parts if k != "phrase"] if explanation.token_target == "leave-one-out" else []
    alone = [k for k in parts if k not in left_out] if explanation.token_target else []
    notes = []
    if left_out:
        notes.append(
            f"Score of a {' or '.join(left_out)}: what the {explanation.target} loses without it; "
            "below zero, the caption fits better without it."
        )
    if alone:
        notes.append(f"Score of a {' or '.join(alone)}: its {explanation.target} as a text of its own.")
    return " ".join(notes)


def _written_score(explanation: Explanation) -> str:
    """The same of a text that was written token by token."""
    what = SCALARS.get(explanation.target, explanation.target)
    meanings = {
        "token": f"the {what} at its place",
        "word": f"the mean {what} of its tokens",
        "phrase": f"the mean {what} of its tokens",
        "caption": f"the mean {what} of its tokens",
        "where": f"the {what} of the token that was not written, at that place",
        "contrast": f"by how much the {what} of the first exceeds that of the second",
    }
    there = dict.fromkeys(e.kind for e in explanation.entries)
    said: dict[str, list[str]] = {}
    for kind in (k for k in meanings if k in there):
        said.setdefault(meanings[kind], []).append(kind)
    names = {"where": "token in place of another"}
    return " ".join(
        f"Score of a {' or '.join(names.get(k, k) for k in kinds)}: {meaning}." for meaning, kinds in said.items()
    )


def shared_note(explanation: Explanation) -> str:
    """What stands over a map that is one for all entries."""
    asked = "class" if any(entry.kind == "class" for entry in explanation.entries) else "text"
    return f"does not see the {asked}: one map for all entries"


def entry_titles(explanation: Explanation) -> list[str]:
    """The label of each entry, the second and later ones of the same kind with their number."""
    count: Counter[tuple[str, str]] = Counter()
    made = []
    for entry in explanation.entries:
        title = entry_title(explanation, entry)
        count[entry.kind, title] += 1
        times = count[entry.kind, title]
        made.append(title + (f" ({times})" if times > 1 else ""))
    return made


def score_line(entry: Entry) -> str:
    """What an entry is, its score and its probability, for the label beside its maps."""
    kind = "" if entry.kind == "class" else f"{entry.kind} · "  # the heading has the target
    return f"{kind}score {number(entry.score)}{_chance(entry)}"


def _chance(entry: Entry) -> str:
    """The probability of a class, or of a token that was written, to stand behind its score."""
    if entry.probability is None:
        return ""
    if 0.995 <= entry.probability < 1:
        return " · p>0.99"
    return f" · p={entry.probability:.2f}" if entry.probability >= 0.095 else f" · p={entry.probability:.1g}"


def changed_options(column: MethodMaps) -> str:
    """The options that are not at the method's defaults; all of them where the method is not here any more."""
    usual = _defaults(column.method)
    return ", ".join(f"{k} {_value(v)}" for k, v in column.options.items() if k not in usual or usual[k] != v)


def _defaults(method: str) -> Mapping[str, Any]:
    from grounding.methods import METHODS

    try:
        return dict(METHODS[method].defaults)
    except (GroundingError, ImportError, AttributeError):
        return {}


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def short_layer(layer: str) -> str:
    """A path from its last numbered part on: `...layers.3.layer_norm1`. Several are shortened one by one."""
    return re.sub(r"(?<![\w.])(?:\w+\.)+?(?=\w+\.\d+(?:\.[a-zA-Z_]\w*)*(?:,|$))", "…", layer)


def clipping(entry_map: PatchMap, style: Style, limits: Limits) -> str:
    """How much of a map a fixed scale cuts off; empty where it is nothing."""
    parts = zip(clipped(entry_map, style, limits), ("below", "above"), strict=True)
    return " and ".join(f"{percent(part)} of the patches {where} the scale" for part, where in parts if part)
