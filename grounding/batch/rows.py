"""From explanations to the rows of a batch run, and back. What a row is made of: see `run_tables`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from grounding.batch.run_tables import About, Row
from grounding.core.errors import GroundingError
from grounding.core.geometry import Geometry
from grounding.core.images import Picture
from grounding.explanation.explanation import Alternative, Entry, Explanation, MapColumn
from grounding.explanation.maps import Status
from grounding.explanation.serialization import entry_json, plain

OK, TRUNCATED, DEGENERATE = "ok", "ok_truncated", "degenerate"
CRASHED, OUT_OF_MEMORY, MODEL, INPUT = "failed_crash", "failed_oom", "failed_model", "failed_input"
STATUSES = (
    OK,
    TRUNCATED,
    DEGENERATE,
    "failed_read",
    "failed_decode",
    INPUT,
    MODEL,
    "failed_numeric",
    OUT_OF_MEMORY,
    CRASHED,
)
# Entries of this kind are texts of their own about a phrase, e.g. "image of two young guys".
PROMPT = "prompt"


def failed(sample: str, line: int, caption: str | None, status: str, error: str, name: str | None = None) -> Row:
    """The row of a pair that could not be explained; `name` where it is not `sample#line`."""
    return {
        "id": name or f"{sample}#{line}",
        "image": sample,
        "line": line,
        "caption": caption,
        "status": status,
        "error": error,
    }


def explained(sample: str, line: int, found: Explanation, prompts: Mapping[tuple[int, int], Explanation]) -> Row:
    """The row of an explanation with, by characters [start, end) of its caption, those of its prompts."""
    entries = [entry_json(entry) for entry in found.entries]
    for (start, end), one in prompts.items():
        entries.append(entry_json(one.entries[0]) | {"label": one.caption, "kind": PROMPT, "start": start, "end": end})
    row = {
        "id": f"{sample}#{line}",
        "image": sample,
        "line": line,
        "caption": found.caption,
        "status": status_of(found),
        "image_sha256": found.picture.sha256,
        "origin": found.origin,
        "truncated": found.truncated,
        "score": plain(found.score),
        "entries": entries,
        "geometry": found.geometry.to_dict() | {"seen": [float(v) for v in found.geometry.seen]},
        "warnings": list(dict.fromkeys(w for one in (found, *prompts.values()) for w in one.warnings)),
    }
    for key, column in found.columns.items():
        parts = [column] if column.shared else [column, *(one.columns[key] for one in prompts.values())]
        maps = np.concatenate([part.maps for part in parts])
        row[key] = _packed(maps, [status for part in parts for status in part.status])
    return row


def status_of(found: Explanation) -> str:
    """`degenerate` where a method has no evidence for the caption (or the first entry), else whether it was cut."""
    first = next((i for i, entry in enumerate(found.entries) if entry.kind == "caption"), 0)
    if not all(column.status[column.index(first)] for column in found.columns.values()):
        return DEGENERATE
    return TRUNCATED if found.truncated else OK


def share_maps(rows: Sequence[Row], shared: Iterable[str]) -> None:
    """Keep the maps that do not see the text in the first row of each picture that has them."""
    for key in shared:
        stored: set[str] = set()
        for row in rows:
            if row.get(key) is not None:
                if row["image"] in stored:
                    row[key] = None
                stored.add(row["image"])


def _packed(maps: np.ndarray, status: Sequence[Status]) -> Row:
    """Scaled to [-1, 1] by the largest absolute value: float16 then has about three digits of every map."""
    scales = np.abs(maps).max(axis=(1, 2)).astype(np.float32)
    divisor = np.where(scales > 0, scales, np.float32(1))[:, None, None]
    values = (maps / divisor).astype("<f2")
    return {
        "values": values.tobytes(),
        "scales": [float(scale) for scale in scales],
        "status": [one.status for one in status],
        "reason": [one.reason for one in status],
    }


def explanation_of(
    row: Row, about: About, picture: Picture, shared: Mapping[str, Row], *, prompts: bool = False
) -> Explanation:
    """The explanation of a row that did not fail; `shared` are the maps of its picture that do not see the text.

    With `prompts` its entries of that kind are kept, too. Maps are as they were to float16. Raises GroundingError.
    """
    if row["entries"] is None:
        raise GroundingError(f"row {row['id']!r} has no maps: {row['status']} ({row['error']})")
    kept = [i for i, entry in enumerate(row["entries"]) if prompts or entry["kind"] != PROMPT]
    geometry = Geometry.from_dict({k: v for k, v in row["geometry"].items() if k != "seen"})
    columns = {}
    for key, method in about.methods.items():
        stored = row[key] if method["text_conditioned"] else shared[key]
        maps, status = _unpacked(stored, geometry)
        if method["text_conditioned"]:
            maps, status = maps[kept], tuple(status[i] for i in kept)
        columns[key] = MapColumn(key=key, **method, maps=maps, status=status)
    return Explanation(
        picture=picture,
        caption=row["caption"],
        entries=tuple(_entry_of(row["entries"][i]) for i in kept),
        columns=columns,
        geometry=geometry,
        target=about.target,
        token_target=about.token_target,
        model=about.model,
        warnings=tuple(row["warnings"]),
        provenance=about.provenance,
        origin=row["origin"],
        truncated=row["truncated"],
    )


def _unpacked(stored: Row, geometry: Geometry) -> tuple[np.ndarray, tuple[Status, ...]]:
    scales = np.array(stored["scales"], np.float32)
    values = np.frombuffer(stored["values"], "<f2").reshape(len(scales), geometry.rows, geometry.columns)
    status = tuple(Status(s, r) for s, r in zip(stored["status"], stored["reason"], strict=True))
    return values.astype(np.float32) * scales[:, None, None], status


def _entry_of(item: Row) -> Entry:
    others = tuple(
        Alternative(one["label"], one["token_id"], _number(one["probability"])) for one in item["alternatives"]
    )
    return Entry(**{**item, "score": _number(item["score"]), "alternatives": others})


def _number(value: float | None) -> float:
    """A number that a table has as null where it was not finite."""
    return float("nan") if value is None else value
