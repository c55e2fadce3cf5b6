"""Explanations and layers as aligned text for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grounding.core.printable import escape
from grounding.explanation.labels import entry_title, likelihood, next_best, origin_words

if TYPE_CHECKING:
    from grounding.adapter.structure import Layer
    from grounding.core.text import Alternative
    from grounding.explanation.explanation import Entry, Explanation, PatchMap

LABEL_WIDTH = 32
WIDEST = 160
TOP_CLASSES = 5


def headline(explanation: Explanation) -> str:
    """Image, model, target and origin of the text in one line."""
    name = explanation.image.path or "image"
    size = f"{explanation.image.width} x {explanation.image.height}"
    token_target = f"parts of the caption: {explanation.token_target}" if explanation.token_target else ""
    model = f"{explanation.model['type']} {explanation.model['id']}"
    parts = [f"{name} ({size})", model, f"target {explanation.target}", origin_words(explanation) or token_target]
    return escape(", ".join(part for part in parts if part))


def explanation_table(explanation: Explanation) -> str:
    """Entry, score, and per method peak (x, y) and box (x0, y0, x1, y1) in original pixels.

    Generated tokens have their probability and two alternatives; below classes the five most probable are listed.
    The boxes are omitted if the table would be wider than WIDEST characters.
    """
    whole = table(_rows(explanation, boxes=True))
    if max(map(_width, whole.splitlines())) > WIDEST:
        whole = f"{table(_rows(explanation, boxes=False))}\nboxes: see the JSON"
    top = _top_classes(explanation)
    return f"{whole}\n\n{top}" if top else whole


def _top_classes(explanation: Explanation) -> str:
    """The most probable classes of the image; empty if no class was explained."""
    candidates: list[Entry | Alternative] = []
    for entry in explanation.entries:
        candidates += [entry, *entry.alternatives] if entry.kind == "class" else []
    by_index = {one.token_id: one for one in candidates}
    known = [one for one in by_index.values() if one.probability is not None]
    best = sorted(known, key=lambda one: -(one.probability or 0))[:TOP_CLASSES]
    rows = [[escape(one.label), str(one.token_id), likelihood(one.probability or 0)] for one in best]
    return table([["most probable", "index", "p"], *rows]) if rows else ""


def _rows(explanation: Explanation, *, boxes: bool) -> list[list[str]]:
    probabilities = any(e.probability is not None for e in explanation.entries)
    others = any(e.alternatives and e.kind != "class" for e in explanation.entries)
    rows = [["entry", "kind", "score", *(["p"] if probabilities else []), *(["next best"] if others else [])]]
    for key in explanation.methods:
        rows[0] += [f"{key} peak", *(["box"] if boxes else [])]
    for i, entry in enumerate(explanation.entries):
        row = [escape(entry_title(explanation, entry)), entry.kind, f"{entry.score:+.4f}"]
        if probabilities:
            row.append("-" if entry.probability is None else f"{entry.probability:.4f}")
        if others:
            row.append(_ellipsis(escape(next_best(entry))) or "-")
        for key, method in explanation.methods.items():
            cells = ['"', '"'] if method.shared and i else _cells(explanation.map(i, key))
            row += cells if boxes else cells[:1]
        rows.append(row)
    return rows


def _cells(patch_map: PatchMap) -> list[str]:
    if not patch_map.status:
        return ["no evidence", "-"]
    peak, box = patch_map.peak, patch_map.box
    return [
        "-" if peak is None else f"{peak[0]:.1f}, {peak[1]:.1f}",
        "-" if box is None else ", ".join(map(str, box)),
    ]


def layer_table(layers: Sequence[Layer]) -> str:
    """Path, short name, output shape and liveness of each layer."""
    rows = [["layer", "short", "output", "state"]]
    rows += [
        [
            layer.path,
            layer.alias,
            " x ".join(map(str, layer.shape)),
            "default" if layer.default else "live" if layer.live else "dead",
        ]
        for layer in layers
    ]
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns with a rule below the header; wide characters count as two."""
    short = [[_ellipsis(cell) if i == 0 and len(rows[0]) > 4 else cell for i, cell in enumerate(row)] for row in rows]
    widths = [max(_width(row[i]) for row in short) for i in range(len(short[0]))]
    lines = [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in short
    ]
    return "\n".join([lines[0], "-" * min(sum(widths) + 2 * len(widths) - 2, WIDEST), *lines[1:]])


def _ellipsis(text: str) -> str:
    return text if len(text) <= LABEL_WIDTH else text[: LABEL_WIDTH - 1] + "\u2026"


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)
