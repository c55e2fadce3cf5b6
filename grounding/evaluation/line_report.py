"""An evaluation of lines as Markdown tables for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grounding.core.printable import escape
from grounding.evaluation.report import percent, table, with_interval


def markdown(document: Mapping[str, Any]) -> str:
    """The rules in a few lines, then how the lines were read, where the maps peak, and both for groups of lines."""
    parts = [_rules(document), _reading(document), _maps(document)]
    if document["groups"]:
        parts.append(_groups(document))
    if document["recommended"]:
        parts.append(_recommended(document["recommended"]))
    return "\n\n".join(parts)


def _rules(document: Mapping[str, Any]) -> str:
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
