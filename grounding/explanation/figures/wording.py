"""Texts in figures: facts, scale, legend, scores, methods. Plain text, no layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import floor
from typing import Any

from grounding.core.errors import GroundingError
from grounding.core.images import Picture
from grounding.explanation.explanation import Entry, Explanation, MethodMaps, PatchMap
from grounding.explanation.figures.fonts import printable
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.painter import Limits, clipped
from grounding.explanation.labels import entry_title, origin_words

LONGEST_NAME = 60
SCALARS = {"log_probability": "log-probability", "logits": "logit"}


def number(value: float) -> str:
    """Three significant digits, with a typographic minus sign."""
    return f"{value:.3g}".replace("-", "−")


def span(limits: Limits) -> str:
    """`low to high`."""
    return f"{number(limits[0])} to {number(limits[1])}"


def percent(fraction: float) -> str:
    """A fraction above 0, rounded down: never 0%, and 100% only for 1."""
    return f"{floor(100 * fraction)}%" if fraction >= 0.01 else "less than 1%"


def name_of(path: str | None) -> str:
    """The last part of an image's path or address, shortened in its middle."""
    path = (path or "").rstrip("\\/")
    name = re.split(r"[\\/]", path)[-1] or "image from memory"
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def image_facts(image: Picture) -> str:
    """Name and size of an image."""
    return f"{name_of(image.path)}, {image.width} x {image.height} pixels"


def model_name(model: Mapping[str, Any]) -> str:
    """The id of a model."""
    return f"model {model.get('id') or 'unnamed'}"


def facts(explanation: Explanation) -> str:
    """Image, model, origin of the text, target and score in one line."""
    origin = origin_words(explanation)
    token_target = f" ({explanation.token_target})" if explanation.token_target else ""
    parts = [
        image_facts(explanation.image),
        model_name(explanation.model),
        *([origin] if origin else []),
        f"target {explanation.target}{token_target}",
        *([] if explanation.score is None else [f"score {number(explanation.score)}"]),
    ]
    return " · ".join(parts)


def drawn_around_zero(
    methods: Iterable[MethodMaps], options: FigureOptions
) -> tuple[list[MethodMaps], list[MethodMaps]]:
    """The methods drawn from low to high, and those drawn with zero at the centre of the colour map."""
    plain: list[MethodMaps] = []
    around: list[MethodMaps] = []
    for one in methods:
        (around if options.signed and one.signed else plain).append(one)
    return plain, around


def symmetric(limits: Limits) -> Limits:
    """Limits widened to be symmetric around zero."""
    reach = max(map(abs, limits))
    return -reach, reach


def scale_note(methods: Iterable[MethodMaps], options: FigureOptions) -> str:
    """Which values have the end colours of the colour map, and how negative values are drawn."""
    plain, around = drawn_around_zero(methods, options)
    scale, fixed = options.scale, options.limits
    centre = "zero at the centre"
    if scale == "fixed" and fixed is not None:
        text = f"Scale fixed: all maps from {span(symmetric(fixed) if around and not plain else fixed)}"
        extra = f"signed maps from {span(symmetric(fixed))}" if plain else centre
    elif scale == "caption":
        text = "Scale per caption: one range per method over all entries, given with its name"
        extra = f"{centre} for signed maps" if plain else centre
    elif plain:
        text = "Scale per entry: each map from its own lowest to its own highest value"
        extra = "signed maps symmetric around zero"
    else:
        text, extra = "Scale per entry: each map to its own largest absolute value", centre
    parts = [f"{text}, {extra}" if around else text]
    if scale == "entry":
        parts.append("compare the raw numbers")
    if any(one.signed for one in plain):
        parts.append("negative values are drawn as zero")
    if around and options.diverging != options.cmap != FigureOptions.cmap:
        parts.append(f"{options.cmap} is not diverging: signed maps use {options.diverging}")
    return "; ".join(parts) + "."


def titles(methods: Iterable[MethodMaps]) -> str:
    """The titles of methods, each once."""
    return ", ".join(dict.fromkeys(one.title for one in methods))


def legend(explanation: Explanation, options: FigureOptions) -> str:
    """The meaning of the marks that occur in the figure."""
    seen = explanation.geometry.seen_fraction
    outside = " (may miss the strongest patch)" if options.peak else ""
    parts = [
        *(["○ strongest patch"] if options.peak else []),
        *([f"□ largest region above half the range{outside}"] if options.box else []),
        *(["one colour per patch, no interpolation"] if options.cells else []),
        *([f"▨ unseen by the model: {percent(1 - seen)}"] if seen < 1 else []),
        *(["overview: the model's low-resolution view, unmarked"] if explanation.overview else []),
    ]
    others = [one.label for e in explanation.entries for one in e.alternatives]
    texts = [explanation.caption, *(e.label for e in explanation.entries), *others, *explanation.warnings]
    if any("\\" in printable(t, "bold") and "\\" not in t for t in texts):
        parts.append(r"\u.. or \x..: a character that cannot be drawn here")
    return " · ".join(parts)


def score_note(explanation: Explanation) -> str:
    """The meaning of the scores of classes, the image or parts of the caption; empty where there are none."""
    if any(entry.kind == "class" for entry in explanation.entries):
        return "Score of a class: its logit."
    if any(entry.kind == "image" for entry in explanation.entries):
        return f"Score of the image: its {explanation.target}, which no text can change."
    if explanation.origin != "given":
        return _generated_score_note(explanation)
    parts = [k for k in ("token", "word", "phrase") if any(e.kind == k for e in explanation.entries)]
    # A phrase is always scored as a text of its own.
    left_out = [k for k in parts if k != "phrase"] if explanation.token_target == "leave-one-out" else []
    alone = [k for k in parts if k not in left_out] if explanation.token_target else []
    scalar = SCALARS.get(explanation.target, explanation.target)
    notes = []
    if left_out:
        notes.append(
            f"Score of a {' or '.join(left_out)}: how much the {scalar} drops without it; "
            "below zero, the caption fits better without it."
        )
    if alone:
        notes.append(f"Score of a {' or '.join(alone)}: its {scalar} as a text of its own.")
    return " ".join(notes)


def _generated_score_note(explanation: Explanation) -> str:
    """The meaning of the scores of a text that was generated token by token."""
    scalar = SCALARS.get(explanation.target, explanation.target)
    meanings = {
        "token": f"the {scalar} at its position",
        "word": f"the mean {scalar} of its tokens",
        "phrase": f"the mean {scalar} of its tokens",
        "caption": f"the mean {scalar} of its tokens",
        "where": f"the {scalar} of the token that was not generated, at that position",
        "contrast": f"by how much the {scalar} of the first token exceeds that of the second",
    }
    present = {e.kind for e in explanation.entries}
    kinds_of: dict[str, list[str]] = {}
    for kind in (k for k in meanings if k in present):
        kinds_of.setdefault(meanings[kind], []).append(kind)
    names = {"where": "token in place of another"}
    return " ".join(
        f"Score of a {' or '.join(names.get(k, k) for k in kinds)}: {meaning}." for meaning, kinds in kinds_of.items()
    )


def shared_note(explanation: Explanation) -> str:
    """The note above a map that all entries share; empty where the image is the only entry."""
    if any(entry.kind == "image" for entry in explanation.entries):
        return ""
    query = "class" if any(entry.kind == "class" for entry in explanation.entries) else "text"
    return f"independent of the {query}: one map for all entries"


def entry_titles(explanation: Explanation) -> list[str]:
    """The title of each entry; repeated titles of one kind are numbered from 2."""
    count: Counter[tuple[str, str]] = Counter()
    made = []
    for entry in explanation.entries:
        title = entry_title(explanation, entry)
        count[entry.kind, title] += 1
        times = count[entry.kind, title]
        made.append(title + (f" ({times})" if times > 1 else ""))
    return made


def score_line(entry: Entry) -> str:
    """Kind, score and probability of an entry, for the label beside its maps."""
    # The heading has the target of a class; the title of the entry of an image is its kind.
    kind = "" if entry.kind in ("class", "image") else f"{entry.kind} · "
    return f"{kind}score {number(entry.score)}{_probability(entry)}"


def _probability(entry: Entry) -> str:
    """The probability of a class or a generated token, placed after its score; else empty."""
    if entry.probability is None:
        return ""
    if 0.995 <= entry.probability < 1:
        return " · p>0.99"
    return f" · p={entry.probability:.2f}" if entry.probability >= 0.095 else f" · p={entry.probability:.1g}"


def changed_options(maps: MethodMaps) -> str:
    """The options that differ from the method's defaults; all of them if the method is not installed."""
    defaults = _defaults(maps.method) if maps.options else {}
    return ", ".join(f"{k} {_value(v)}" for k, v in maps.options.items() if k not in defaults or defaults[k] != v)


def _defaults(method: str) -> Mapping[str, Any]:
    # Stored results hold the values of options without the defaults: only the method has these, and it imports torch.
    from grounding.methods import METHODS

    try:
        return dict(METHODS[method].defaults)
    except (GroundingError, ImportError, AttributeError):
        return {}


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def short_layer(layer: str) -> str:
    """A layer path from its last numbered part on: `…layers.3.layer_norm1`. Several paths are shortened one by one."""
    return re.sub(r"(?<![\w.])(?:\w+\.)+?(?=\w+\.\d+(?:\.[a-zA-Z_]\w*)*(?:,|$))", "…", layer)


def clipping(patch_map: PatchMap, options: FigureOptions, limits: Limits) -> str:
    """The fractions of a map outside a fixed scale; empty where there are none."""
    parts = zip(clipped(patch_map, options, limits), ("below", "above"), strict=True)
    return " and ".join(f"{percent(part)} of the patches {where} the scale" for part, where in parts if part)
