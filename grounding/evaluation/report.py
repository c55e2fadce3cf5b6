"""An evaluation as Markdown tables for a reader, and as a JSON file for a program."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grounding.core.errors import OutputError
from grounding.core.files import write_together
from grounding.core.printable import escape, quote

# What marks a file as one of ours; only such files are replaced.
FORMAT = "grounding.evaluation"
# Warnings about texts that are printed; a data set may have one for every phrase.
SAID = 5


def phrase_markdown(document: Mapping[str, Any]) -> str:
    """The rules in a few lines, then a table for all phrases, one by type, and those that the document has besides."""
    methods = document["methods"]
    parts = [_phrase_rules(document), _main(methods), _parts("type", methods, lambda scores: scores["by_type"])]
    if any(scores["heldout"] for scores in methods.values()):
        split = {"held out of training": "heldout", "not held out": "not_heldout"}
        parts.append(_parts("phrases", methods, lambda scores: {name: scores[key] for name, key in split.items()}))
    if "swap_accuracy" in document:
        low, high = document["swap_accuracy_ci"] or (float("nan"),) * 2
        parts.append(
            f"The model itself gives the true caption the higher score than one with a single word swapped in "
            f"{100 * document['swap_accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of "
            f"{document['swap_captions']} pairs (target {document['rules']['target']})."
        )
    if "faithfulness" in document:
        parts += _faithfulness(document["faithfulness"])
    return "\n\n".join(parts)


def warnings_of(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know besides: every problem of the data, and the commonest warnings about texts."""
    said = [f"{text} ({count} of the texts)" for text, count in document["warnings"].items()]
    more = [f"and {len(said) - SAID} other warnings, see the JSON document"] if len(said) > SAID else []
    return [*document["problems"], *said[:SAID], *more]


def check_file(path: str | Path) -> Path:
    """The path, if an evaluation can be written there: nothing, or an evaluation of ours. Raises OutputError."""
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{quote(path)} is a folder; --output names a file")
    if path.exists() and not _is_ours(path):
        raise OutputError(f"{quote(path)} was not written by this command and is not replaced; choose another --output")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {quote(path)}: {quote(folder)} is no folder that can be written into")
    return path


def write_file(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document as JSON, whole or not at all. Raises OSError."""
    write_together(path.parent, {path.name: (as_json(document) + "\n").encode()}, ())


def as_json(document: Mapping[str, Any]) -> str:
    """The document as JSON text; NaN is an error."""
    return json.dumps(document, indent=2, allow_nan=False)


def _is_ours(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    # One document, or one per protocol.
    parts = [content, *content.values()] if isinstance(content, dict) else []
    return any(isinstance(part, dict) and part.get("format") == FORMAT for part in parts)


def _phrase_rules(document: Mapping[str, Any]) -> str:
    rules = document["rules"]
    skipped = ", ".join(f"{reason} {count}" for reason, count in document["skipped"].items()) or "none"
    peak = "centre of the strongest seen patch"
    if rules["peak"] == "pixel":
        peak = f"first maximum of the map at original size ({rules['interpolation']})"
    limit = f", the first {rules['limit']}" if rules["limit"] else ""
    threshold = f"{rules['threshold']}"
    if rules["tuned"]:
        found = {name: scores["threshold"] for name, scores in document["methods"].items() if scores["threshold"]}
        threshold += " (" + ", ".join(f"{name} {value:g}" for name, value in found.items()) + ")"
    entities = f"pictures with at least {rules['min_entities']} entities"
    level = f"{100 * rules['interval']['level']:.0f} %"
    lines = [
        f"Protocol {document['protocol']}: {rules['text']}; peak: {peak}; hit: {rules['hit']}.",
        f"Model {document['model']}, target {rules['target']}.",
        f"Data {document['data']}, split {document['split']}{limit}; captions: {rules['captions']}; {entities}.",
        f"{document['pictures']} pictures, {_cases(document)} scored; phrases skipped: {skipped}.",
        f"[ ]: {level} interval, bootstrap over pictures. Box threshold: {threshold}. Random: {rules['random']}.",
    ]
    return "\n".join(escape(line) for line in lines)


def _cases(document: Mapping[str, Any]) -> str:
    """How many phrases, and of which cases where several phrases may be one."""
    phrases, unit = f"{document['phrases']} phrases", document["rules"].get("unit", "phrases")
    return phrases if unit == "phrases" else f"{document['cases']} {unit} ({phrases})"


def _main(methods: Mapping[str, Any]) -> str:
    head = ["map", "pointing %", "hottest entity %", "IoU 0.5 %", "mean IoU %", "energy %", "area %"]
    head += ["swap %", "map correlation", "blank"]
    rows = [
        [
            name,
            with_interval(scores["pointing"], scores["ci"]),
            percent(scores["entity"]),
            percent(scores["iou50"]),
            percent(scores["mean_iou"]),
            with_interval(scores["energy"], scores["energy_ci"]),
            percent(scores["area"]),
            with_interval(scores["swap"], scores["swap_ci"]),
            _plain(scores["caption_swap_correlation"]),
            "-" if scores["degenerate"] is None else str(scores["degenerate"]),
        ]
        for name, scores in methods.items()
    ]
    return table(head, rows)


def _parts(what: str, methods: Mapping[str, Any], part: Any) -> str:
    """Pointing on parts of the phrases: a row per part, a column per method."""
    names = list(part(next(iter(methods.values()))))
    rows = []
    for name in names:
        found = [part(scores)[name] or {"pointing": None, "ci": None, "phrases": 0} for scores in methods.values()]
        rows.append([name, str(found[0]["phrases"]), *(with_interval(f["pointing"], f["ci"]) for f in found)])
    return table([what, "number", *(f"{name} %" for name in methods)], rows)


def _faithfulness(found: Mapping[str, Any]) -> list[str]:
    blur = f" (standard deviation {found['blur']:g} of the short side)" if found["blur"] else ""
    words = (
        f"Faithfulness: {found['pictures']} pictures, {found['texts']} texts, {found['steps']} steps, baseline "
        f"{found['baseline']}{blur}; mean score {found['score']['whole']:.3f}, with nothing left "
        f"{found['score']['nothing']:.3f}. Areas: 0 the score falls at once, 1 it never falls."
    )
    head = ["map", "deletion", "- random", "insertion", "- random", "two captions", "foreign caption"]
    rows = []
    for name, scores in found["methods"].items():
        cells = []
        for kind in ("deletion", "insertion"):
            own = scores[kind]
            cells.append(with_interval(own["auc"], own["ci"], _plain))
            cells.append(with_interval(own.get("minus_random"), own.get("minus_random_ci"), _plain))
        rows.append([name, *cells, _plain(scores.get("text_sensitivity")), _plain(scores.get("foreign_text"))])
    tables = [words, table(head, rows)]
    mapped = {name: scores["randomisation"] for name, scores in found["methods"].items() if "randomisation" in scores}
    redrawn = [[name, *(_plain(depths[i]) for depths in mapped.values())] for i, name in enumerate(found["randomised"])]
    note = "Correlation with the trained model's map, weights drawn anew from the top down to:"
    return [*tables, note, table(["down to", *mapped], redrawn)]


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A fraction in per cent, a dash for none."""
    return "-" if value is None else f"{100 * value:.1f}"


def with_interval(value: float | None, interval: Sequence[float] | None, number: Any = percent) -> str:
    """A value and its interval in brackets, both as `number` writes them."""
    if value is None or interval is None:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *rows]
    # A bar would end the cell.
    return "\n".join("| " + " | ".join(escape(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def line_markdown(document: Mapping[str, Any]) -> str:
    """The rules in a few lines, then how the lines were read, where the maps peak, and both for groups of lines."""
    parts = [_line_rules(document), _reading(document), _maps(document)]
    if document["groups"]:
        parts.append(_groups(document))
    if document["recommended"]:
        parts.append(_recommended(document["recommended"]))
    return "\n\n".join(parts)


def _line_rules(document: Mapping[str, Any]) -> str:
    rules, words = document["rules"], document["definitions"]
    split = "" if document["split"] is None else f", split {document['split']}"
    limit = f", the first {rules['limit']}" if rules["limit"] else ""
    skipped = ", ".join(f"{reason} {count}" for reason, count in document["skipped"].items()) or "none"
    level = f"{100 * rules['interval']['level']:.0f} %"
    lines = [
        f"Protocol {document['protocol']}.",
        f"Model {document['model']}, target {rules['target']}.",
        f"Data {document['data']}{split}{limit}: {document['lines']} lines; skipped: {skipped}.",
        f"{document['characters']} characters in lines read exactly. [ ]: {level} interval, bootstrap over lines.",
        *(f"{name}: {words[key]}." for name, key in (("CER", "cer"), ("Elsewhere", "elsewhere"))),
        *([f"Aimed: {words['aimed']}."] if rules["aimed"] else []),
        *(f"{name.capitalize()}: {words[name]}." for name in ("position", "random")),
    ]
    return "\n".join(escape(line) for line in lines)


def _reading(document: Mapping[str, Any]) -> str:
    parts = {"all": document, **document["groups"]}
    rows = [
        [
            name,
            str(found["lines"]),
            with_interval(found["cer"], found["cer_ci"]),
            with_interval(found["exact"], found["exact_ci"]),
        ]
        for name, found in parts.items()
    ]
    return table(["lines", "number", "CER %", "read exactly %"], rows)


def _maps(document: Mapping[str, Any]) -> str:
    aimed = document["rules"]["aimed"]
    rows = [
        [
            name,
            with_interval(found["in_box"], found["ci"]),
            percent(found["elsewhere"]),
            *([with_interval(found["aimed"], found["aimed_ci"])] if aimed else []),
            "-" if found["degenerate"] is None else str(found["degenerate"]),
        ]
        for name, found in document["methods"].items()
    ]
    return table(["map", "in own box %", "elsewhere %", *(["aimed %"] if aimed else []), "blank"], rows)


def _groups(document: Mapping[str, Any]) -> str:
    methods = document["methods"]
    rows = []
    for name in document["groups"]:
        found = [own["groups"][name] for own in methods.values()]
        rows.append([name, str(found[0]["n"]), *(with_interval(f["in_box"], f["ci"]) for f in found)])
    return table(["in own box", "number", *(f"{name} %" for name in methods)], rows)


def _recommended(found: Mapping[str, Any]) -> str:
    figure = with_interval(found["in_box"], found["ci"])
    return escape(f"Recommended, the best on the split {found['split']}: {found['method']}, {figure} % there.")
