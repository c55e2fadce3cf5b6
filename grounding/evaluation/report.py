"""Evaluation documents as Markdown tables and as JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.core.errors import OutputError
from grounding.core.files import write_together
from grounding.core.printable import escape, quote

# Marks a file as an evaluation document; only such files are overwritten.
FORMAT = "grounding.evaluation"
# Number of warnings about texts that are printed: a data set may have one for each phrase.
MAX_WARNINGS = 5


def check_file(path: str | Path) -> Path:
    """Return the path if an evaluation can be written there. Raises OutputError, also for a file of another kind."""
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{quote(path)} is a folder; --output names a file")
    if path.exists() and not _is_document(path):
        raise OutputError(f"{quote(path)} was not written by this command and is not replaced; choose another --output")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {quote(path)}: {quote(folder)} is no folder that can be written into")
    return path


def write_file(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document as JSON, atomically. Raises OSError."""
    write_together(path.parent, {path.name: (as_json(document) + "\n").encode()}, ())


def as_json(document: Mapping[str, Any]) -> str:
    """Return the document as JSON text. Raises ValueError for NaN."""
    return json.dumps(document, indent=2, allow_nan=False)


def _is_document(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    # One document, or one per protocol.
    parts = [content, *content.values()] if isinstance(content, dict) else []
    return any(isinstance(part, dict) and part.get("format") == FORMAT for part in parts)


def warnings_of(document: Mapping[str, Any]) -> list[str]:
    """Return the warnings to print: all problems of the data, and the most frequent warnings about texts."""
    warnings = [f"{text} ({count} of the texts)" for text, count in document["warnings"].items()]
    rest = len(warnings) - MAX_WARNINGS
    more = [f"and {rest} other warnings, see the JSON document"] if rest > 0 else []
    return [*document["problems"], *warnings[:MAX_WARNINGS], *more]


# ---------------------------------------------------------------- numbers


def percent(value: float | None) -> str:
    """Return a fraction in per cent, a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def decimal(value: float | None) -> str:
    """Return a number with three decimal places, a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def integer(value: int | None) -> str:
    """Return a whole number, a dash for None."""
    return "-" if value is None else str(value)


def with_interval(value: Any, interval: Sequence[float] | None, number: Callable[[Any], str] = percent) -> str:
    """Return a value and its interval in brackets, both formatted by `number`."""
    if value is None or interval is None:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, the keys of a score and of its interval, and the format of both."""

    heading: str
    value: str
    interval: str = ""
    number: Callable[[Any], str] = percent

    def cell(self, scores: Mapping[str, Any]) -> str:
        """Return the cell of a row."""
        return with_interval(scores.get(self.value), scores.get(self.interval), self.number)


BLANK_MAPS = Column("blank", "degenerate", number=integer)
PHRASE_COLUMNS = (
    Column("pointing %", "pointing", "ci"),
    Column("hottest entity %", "entity"),
    Column("IoU 0.5 %", "iou50"),
    Column("mean IoU %", "mean_iou"),
    Column("energy %", "energy", "energy_ci"),
    Column("area %", "area"),
    Column("swap %", "swap", "swap_ci"),
    Column("map correlation", "caption_swap_correlation", number=decimal),
    BLANK_MAPS,
)
FAITHFULNESS_COLUMNS = (
    Column("deletion", "deletion_auc", "deletion_ci", decimal),
    Column("- random", "deletion_minus_random", "deletion_minus_random_ci", decimal),
    Column("insertion", "insertion_auc", "insertion_ci", decimal),
    Column("- random", "insertion_minus_random", "insertion_minus_random_ci", decimal),
    Column("two captions", "text_sensitivity", number=decimal),
    Column("foreign caption", "foreign_text", number=decimal),
)
RECOGNITION_COLUMNS = (
    Column("number", "lines", number=integer),
    Column("CER %", "cer", "cer_ci"),
    Column("read exactly %", "exact", "exact_ci"),
)
LINE_COLUMNS = (Column("in own box %", "in_box", "ci"), Column("elsewhere %", "elsewhere"))
OTHER_TOKENS = Column("aimed %", "aimed", "aimed_ci")


# ---------------------------------------------------------------- phrases


def phrase_markdown(document: Mapping[str, Any]) -> str:
    """Return the configuration in a few lines, then tables for all phrases, by type, and of optional scores."""
    methods = document["methods"]
    by_type = _table_by_part("type", methods, lambda own: own["by_type"])
    parts = [_phrase_rules(document), _table_of("map", methods, PHRASE_COLUMNS), by_type]
    if any(scores["heldout"] for scores in methods.values()):
        keys = {"held out of training": "heldout", "not held out": "not_heldout"}
        parts.append(
            _table_by_part("phrases", methods, lambda own: {name: own[key] or {} for name, key in keys.items()})
        )
    if "swap_accuracy" in document:
        low, high = document["swap_accuracy_ci"] or (float("nan"),) * 2
        parts.append(
            f"The score of the model is higher for the true caption than for one with a single word swapped in "
            f"{100 * document['swap_accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of "
            f"{document['swap_captions']} pairs (target {document['rules']['target']})."
        )
    if "faithfulness" in document:
        parts += _faithfulness(document["faithfulness"])
    return "\n\n".join(parts)


def _phrase_rules(document: Mapping[str, Any]) -> str:
    rules = document["rules"]
    peak = "centre of the strongest seen patch"
    if rules["peak"] == "pixel":
        peak = f"first maximum of the map at original size ({rules['interpolation']})"
    threshold = f"{rules['threshold']}"
    if rules["tuned"]:
        tuned = {name: scores["threshold"] for name, scores in document["methods"].items() if scores["threshold"]}
        threshold += " (" + ", ".join(f"{name} {value:g}" for name, value in tuned.items()) + ")"
    entities = f"images with at least {rules['min_entities']} entities"
    cases = f"{document['phrases']} phrases"
    # A protocol may join several phrases in one case.
    if (unit := rules.get("unit", "phrases")) != "phrases":
        cases = f"{document['cases']} {unit} ({cases})"
    return _lines(
        f"Protocol {document['protocol']}: {rules['text']}; peak: {peak}; hit: {rules['hit']}.",
        f"Model {document['model']}, target {rules['target']}.",
        f"Data {_data(document)}; captions: {rules['captions']}; {entities}.",
        f"{document['pictures']} images, {cases} scored; phrases skipped: {_skipped(document)}.",
        f"{_interval(document, 'images')} Box threshold: {threshold}. Random: {rules['random']}.",
    )


def _faithfulness(scores: Mapping[str, Any]) -> list[str]:
    blur = f" (standard deviation {scores['blur']:g} of the short side)" if scores["blur"] else ""
    summary = (
        f"Faithfulness: {scores['pictures']} images, {scores['texts']} texts, {scores['steps']} steps, baseline "
        f"{scores['baseline']}{blur}; mean score {scores['score']['whole']:.3f}, without any patch "
        f"{scores['score']['nothing']:.3f}. Areas: 0 if the score drops at once, 1 if it never drops."
    )
    flat = {
        name: own | {f"{kind}_{key}": value for kind in ("deletion", "insertion") for key, value in own[kind].items()}
        for name, own in scores["methods"].items()
    }
    methods = {name: own["randomisation"] for name, own in scores["methods"].items() if "randomisation" in own}
    depths = [[name, *(decimal(own[i]) for own in methods.values())] for i, name in enumerate(scores["randomised"])]
    note = "Correlation with the map of the trained model, parameters randomised from the top down to:"
    return [summary, _table_of("map", flat, FAITHFULNESS_COLUMNS), note, table(["down to", *methods], depths)]


# ---------------------------------------------------------------- lines


def line_markdown(document: Mapping[str, Any]) -> str:
    """Return the configuration in a few lines, then tables of recognition, of the maps, and by groups of lines."""
    groups = {"all": document, **document["groups"]}
    columns = [*LINE_COLUMNS, *([OTHER_TOKENS] if document["rules"]["aimed"] else []), BLANK_MAPS]
    parts = [
        _line_rules(document),
        _table_of("lines", groups, RECOGNITION_COLUMNS),
        _table_of("map", document["methods"], columns),
    ]
    if document["groups"]:
        parts.append(
            _table_by_part("in own box", document["methods"], lambda own: own["groups"], value="in_box", count="n")
        )
    if best := document["recommended"]:
        score = with_interval(best["in_box"], best["ci"])
        parts.append(_lines(f"Recommended, the best on the split {best['split']}: {best['method']}, {score} % there."))
    return "\n\n".join(parts)


def _line_rules(document: Mapping[str, Any]) -> str:
    rules, definitions = document["rules"], document["definitions"]
    return _lines(
        f"Protocol {document['protocol']}.",
        f"Model {document['model']}, target {rules['target']}.",
        f"Data {_data(document)}: {document['lines']} lines; skipped: {_skipped(document)}.",
        f"{document['characters']} characters in lines recognised exactly. {_interval(document, 'lines')}",
        *(f"{name}: {definitions[key]}." for name, key in (("CER", "cer"), ("Elsewhere", "elsewhere"))),
        *([f"Aimed: {definitions['aimed']}."] if rules["aimed"] else []),
        *(f"{name.capitalize()}: {definitions[name]}." for name in ("position", "random")),
    )


# ---------------------------------------------------------------- both


def _lines(*lines: str) -> str:
    return "\n".join(escape(line) for line in lines)


def _data(document: Mapping[str, Any]) -> str:
    """Return the data set, its split and the limit."""
    split = "" if document["split"] is None else f", split {document['split']}"
    limit = f", the first {document['rules']['limit']}" if document["rules"]["limit"] else ""
    return f"{document['data']}{split}{limit}"


def _skipped(document: Mapping[str, Any]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in document["skipped"].items()) or "none"


def _interval(document: Mapping[str, Any], unit: str) -> str:
    return f"[ ]: {100 * document['rules']['interval']['level']:.0f} % interval, bootstrap over {unit}."


def _table_of(heading: str, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Return a table with one row per name; `heading` is that of the names."""
    cells = [[name, *(column.cell(scores) for column in columns)] for name, scores in rows.items()]
    return table([heading, *(column.heading for column in columns)], cells)


def _table_by_part(
    heading: str,
    methods: Mapping[str, Any],
    parts: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]],
    value: str = "pointing",
    count: str = "phrases",
) -> str:
    """Return a table with one row per part of the cases and one column per method; `parts` gives those of a method."""
    by_method = [parts(own) for own in methods.values()]
    rows = []
    for name, first in by_method[0].items():
        cells = (with_interval(own[name].get(value), own[name].get("ci")) for own in by_method)
        rows.append([name, str(first.get(count, 0)), *cells])
    return table([heading, "number", *(f"{name} %" for name in methods)], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(head), ["---"] * len(head), *rows]
    # A bar would end the cell.
    return "\n".join("| " + " | ".join(escape(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
