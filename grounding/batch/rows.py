"""Rows of a batch run as Parquet tables: schema, and conversion of an Explanation to a row and back.

There is one row per image-caption pair. Every row has `id`, `image`, `line` and `status`; a failed row has `error`, any
other row the fields of an explanation. The maps of a method are a struct column named by the method's key:

- `values`: raw signed maps divided by their `scales`, little-endian float16, (maps, rows, columns) in C order;
- `scales`: float32 per map, its largest absolute value; raw = values * scale;
- `status`, `reason`: per map, `ok` or `degenerate` and why.

There is one map per entry. A method that does not depend on the text has one map per image, stored in the first row of
the image that did not fail; its column is null in the other rows. `geometry` has the fields of `Geometry` and the box
`seen`, (x0, y0, x1, y1) in original pixels, origin top-left. Where an image of the table has a second view, the columns
`overview` and `<key>/overview` have its geometry and maps; they are null for other images. Entries refer to characters
[start, end) of the caption.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from grounding.core.errors import GroundingError
from grounding.core.geometry import OVERVIEW, Geometry
from grounding.core.images import Picture
from grounding.core.text import Alternative
from grounding.explanation.explanation import Entry, Explanation, MethodMaps
from grounding.explanation.maps import Status
from grounding.explanation.serialization import entry_json, to_builtin

if TYPE_CHECKING:
    from grounding.adapter.base import Adapter
    from grounding.engine.plan import MethodCall

# Key of the run's metadata in the metadata of a table's schema.
METADATA_KEY = b"grounding"
Row = dict[str, Any]

_ENTRY = pa.struct(
    {
        "label": pa.string(),
        "kind": pa.string(),
        "start": pa.int32(),
        "end": pa.int32(),
        "token_id": pa.int64(),
        "score": pa.float64(),
        "probability": pa.float64(),
        "alternatives": pa.list_(
            pa.struct({"label": pa.string(), "token_id": pa.int64(), "probability": pa.float64()})
        ),
    }
)
_GEOMETRY = pa.struct(
    {
        "width": pa.int32(),
        "height": pa.int32(),
        "input_width": pa.int32(),
        "input_height": pa.int32(),
        "scale": pa.list_(pa.float64()),
        "offset": pa.list_(pa.float64()),
        "rows": pa.int32(),
        "columns": pa.int32(),
        "patch": pa.list_(pa.float64()),
        "seen": pa.list_(pa.float64()),
    }
)
_MAPS = pa.struct(
    {
        "values": pa.binary(),
        "scales": pa.list_(pa.float32()),
        "status": pa.list_(pa.string()),
        "reason": pa.list_(pa.string()),
    }
)
_FIELDS = {
    "id": pa.string(),
    "image": pa.string(),
    "line": pa.int32(),
    "caption": pa.string(),
    "status": pa.string(),
    "error": pa.string(),
    "image_sha256": pa.string(),
    "origin": pa.string(),
    "truncated": pa.bool_(),
    "score": pa.float64(),
    "entries": pa.list_(_ENTRY),
    "geometry": _GEOMETRY,
    "warnings": pa.list_(pa.string()),
}


@dataclass(frozen=True)
class RunMetadata:
    """What all rows of a run share. `methods`: key of a column -> fields of its `MethodMaps`, maps and status apart."""

    methods: Mapping[str, Mapping[str, Any]]
    target: str
    token_target: str | None
    model: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @classmethod
    def of(
        cls, adapter: Adapter, calls: Sequence[MethodCall], target: str, token_target: str | None, seed: int
    ) -> RunMetadata:
        """The metadata of the explanations that these method calls compute."""
        # Imported here: reading a run needs no torch.
        from grounding.engine.provenance import provenance_of
        from grounding.explanation.serialization import to_builtin

        methods = {
            call.key: {
                "method": call.name,
                "title": call.method.title,
                "layer": call.layer,
                "options": to_builtin(call.options),
                "signed": call.method.signed,
                "text_conditioned": adapter.text_conditioned(target, call.method.reads_score),
            }
            for call in calls
        }
        model = {"id": adapter.info.id, "type": adapter.info.type}
        return cls(methods, target, token_target, model, to_builtin(provenance_of(adapter, seed)))

    @property
    def shared(self) -> tuple[str, ...]:
        """Columns of maps that do not depend on the text: keys of methods, and with the ending of the overview."""
        keys = [key for key, method in self.methods.items() if not method["text_conditioned"]]
        return (*keys, *map(overview_column, keys))

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of maps; those of the overview are not in every table."""
        return (*self.methods, *map(overview_column, self.methods))

    def to_json(self) -> str:
        """One line of JSON, equal for equal content."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> RunMetadata:
        """The inverse of `to_json`. Raises GroundingError for any other text."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise GroundingError(f"not a table of a batch run: {error}") from None


def overview_column(key: str) -> str:
    """The column of a method's maps of the second view."""
    return f"{key}/{OVERVIEW}"


def schema(metadata: RunMetadata, *, overview: bool = False) -> pa.Schema:
    """The Parquet schema of a run's tables, with `overview` of those in which an image has a second view."""
    fields = _FIELDS | dict.fromkeys(metadata.methods, _MAPS)
    if overview:
        fields |= {OVERVIEW: _GEOMETRY, **dict.fromkeys(map(overview_column, metadata.methods), _MAPS)}
    return pa.schema(fields, metadata={METADATA_KEY: metadata.to_json()})


def to_table(rows: Sequence[Row], metadata: RunMetadata) -> pa.Table:
    """Rows as a table; missing fields are null."""
    overview = any(row.get(OVERVIEW) is not None for row in rows)
    return pa.Table.from_pylist(list(rows), schema=schema(metadata, overview=overview))


def maps_bytes(rows: Sequence[Row], metadata: RunMetadata) -> int:
    """Uncompressed size of the maps of these rows: two bytes per patch, and four per map for its scale."""
    stored = [maps for row in rows for key in metadata.columns if (maps := row.get(key)) is not None]
    return sum(len(maps["values"]) + 4 * len(maps["scales"]) for maps in stored)


def count_warnings(rows: Sequence[Row], metadata: RunMetadata) -> Counter[str]:
    """Number of rows by warning, and by method without evidence for the caption.

    Other warnings of a method are about one map, so they are left to the rows.
    """
    titles = tuple(f"{method['title']} " for method in metadata.methods.values())
    counts = Counter(w for row in rows for w in set(row.get("warnings") or ()) if not w.startswith(titles))
    for key, method in metadata.methods.items():
        where = f" at {method['layer']}" if method["layer"] else ""
        blank = [row for row in rows if row.get(key) and row[key]["status"][0] != "ok"]
        what = "image" if any(row["entries"][0]["kind"] == "image" for row in blank) else "caption"
        counts.update({f"{method['title']}{where} has no evidence for the {what}": len(blank)} if blank else {})
    return counts


def metadata_of(table: pa.Table | pa.Schema) -> RunMetadata:
    """The run's metadata stored in a table. Raises GroundingError for a table that no batch run wrote."""
    stored = (table if isinstance(table, pa.Schema) else table.schema).metadata or {}
    if METADATA_KEY not in stored:
        raise GroundingError("the table was not written by a batch run: it has no 'grounding' metadata")
    return RunMetadata.from_json(stored[METADATA_KEY])


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
# Kind of an entry that is a separate text about a phrase, e.g. "image of two young guys".
PROMPT = "prompt"


def failed_row(sample: str, line: int, caption: str | None, status: str, error: str, name: str | None = None) -> Row:
    """The row of an image-caption pair that could not be explained; `name` is its id, by default `sample#line`."""
    return {
        "id": name or f"{sample}#{line}",
        "image": sample,
        "line": line,
        "caption": caption,
        "status": status,
        "error": error,
    }


def to_row(sample: str, line: int, found: Explanation, prompts: Mapping[tuple[int, int], Explanation]) -> Row:
    """The row of an explanation. `prompts`: characters [start, end) of the caption -> explanation of a text about them,
    which becomes an entry of kind "prompt"."""
    entries = [entry_json(entry) for entry in found.entries]
    for (start, end), one in prompts.items():
        entries.append(entry_json(one.entries[0]) | {"label": one.caption, "kind": PROMPT, "start": start, "end": end})
    row = {
        "id": f"{sample}#{line}",
        "image": sample,
        "line": line,
        "caption": found.caption,
        "status": row_status(found),
        "image_sha256": found.image.sha256,
        "origin": found.origin,
        "truncated": found.truncated,
        "score": to_builtin(found.score),
        "entries": entries,
        "geometry": _geometry_row(found.geometry),
        "warnings": list(dict.fromkeys(w for one in (found, *prompts.values()) for w in one.warnings)),
    }
    for key, own in found.methods.items():
        parts = [own] if own.shared else [own, *(one.methods[key] for one in prompts.values())]
        maps = np.concatenate([part.maps for part in parts])
        row[key] = _packed(maps, [status for part in parts for status in part.status])
        small = [part.overview for part in parts if part.overview is not None]
        if small:
            status = [status for part in parts for status in part.overview_status]
            row[overview_column(key)] = _packed(np.concatenate(small), status)
    return row if found.overview is None else row | {OVERVIEW: _geometry_row(found.overview)}


def _geometry_row(geometry: Geometry) -> Row:
    return geometry.to_dict() | {"seen": [float(v) for v in geometry.seen]}


def _geometry_of(row: Row) -> Geometry:
    return Geometry.from_dict({k: v for k, v in row.items() if k != "seen"})


def row_status(found: Explanation) -> str:
    """`degenerate` if a method has no evidence for the caption (or the first entry), else `ok_truncated` or `ok`."""
    first = next((i for i, entry in enumerate(found.entries) if entry.kind == "caption"), 0)
    if not all(method.status[method.index(first)] for method in found.methods.values()):
        return DEGENERATE
    return TRUNCATED if found.truncated else OK


def deduplicate_shared_maps(rows: Sequence[Row], shared: Iterable[str]) -> None:
    """Remove maps that do not depend on the text from all rows of an image but the first that has them.

    `shared` are the keys of their methods. The rows are changed in place.
    """
    for key in shared:
        stored: set[str] = set()
        for row in rows:
            if row.get(key) is not None:
                if row["image"] in stored:
                    row[key] = None
                stored.add(row["image"])


def _packed(maps: np.ndarray, status: Sequence[Status]) -> Row:
    """Maps (E, rows, columns) as stored: scaled to [-1, 1] by the largest absolute value of each, so that float16 keeps
    about three digits whatever the size of the map."""
    scales = np.abs(maps).max(axis=(1, 2)).astype(np.float32)
    divisor = np.where(scales > 0, scales, np.float32(1))[:, None, None]
    values = (maps / divisor).astype("<f2")
    return {
        "values": values.tobytes(),
        "scales": [float(scale) for scale in scales],
        "status": [one.status for one in status],
        "reason": [one.reason for one in status],
    }


def from_row(
    row: Row, metadata: RunMetadata, image: Picture, shared: Mapping[str, Row], *, prompts: bool = False
) -> Explanation:
    """The explanation stored in a row.

    `shared` are the maps of the image that do not depend on the text, by method (`RunFolder.shared`). `prompts` keeps
    entries of kind "prompt". Maps have the precision of float16. Raises GroundingError for a failed row.
    """
    if row["entries"] is None:
        raise GroundingError(f"row {row['id']!r} has no maps: {row['status']} ({row['error']})")
    kept = [i for i, entry in enumerate(row["entries"]) if prompts or entry["kind"] != PROMPT]
    geometry = _geometry_of(row["geometry"])
    overview = None if row.get(OVERVIEW) is None else _geometry_of(row[OVERVIEW])
    methods = {}
    for key, method in metadata.methods.items():
        own = kept if method["text_conditioned"] else [0]
        stored = row if method["text_conditioned"] else shared
        maps, status = _unpacked(stored[key], geometry, own)
        methods[key] = MethodMaps(key=key, **method, maps=maps, status=status)
        if overview is not None:
            maps, status = _unpacked(stored[overview_column(key)], overview, own)
            methods[key] = replace(methods[key], overview=maps, overview_status=status)
    return Explanation(
        image=image,
        caption=row["caption"],
        entries=tuple(_entry_of(row["entries"][i]) for i in kept),
        methods=methods,
        geometry=geometry,
        target=metadata.target,
        token_target=metadata.token_target,
        model=metadata.model,
        warnings=tuple(row["warnings"]),
        provenance=metadata.provenance,
        origin=row["origin"],
        truncated=row["truncated"],
        overview=overview,
    )


def _unpacked(stored: Row, geometry: Geometry, kept: list[int]) -> tuple[np.ndarray, tuple[Status, ...]]:
    """The maps with the indices `kept`, and their status."""
    scales = np.array(stored["scales"], np.float32)
    values = np.frombuffer(stored["values"], "<f2").reshape(len(scales), geometry.rows, geometry.columns)
    status = tuple(Status(s, r) for s, r in zip(stored["status"], stored["reason"], strict=True))
    return (values.astype(np.float32) * scales[:, None, None])[kept], tuple(status[i] for i in kept)


def _entry_of(item: Row) -> Entry:
    others = tuple(
        Alternative(one["label"], one["token_id"], _number(one["probability"])) for one in item["alternatives"]
    )
    return Entry(**{**item, "score": _number(item["score"]), "alternatives": others})


def _number(value: float | None) -> float:
    """A number of a table, where null stands for one that is not finite."""
    return float("nan") if value is None else value
