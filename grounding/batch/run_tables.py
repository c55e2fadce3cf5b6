"""Tables of a batch run: one row per picture-caption pair, in Parquet.

A row always has `id`, `image`, `line`, `status`; a failed one also `error`, all others the fields of an explanation.
Maps are stored per method in a struct column of the method's key:

- `values`: raw signed maps divided by their `scales`, little-endian float16, (maps, rows, columns) in C order;
- `scales`: float32 per map, its largest absolute value; raw = values * scale;
- `status`, `reason`: per map, `ok` or `degenerate` and why.

There is one map per entry. A method that does not see the text has one map per picture, stored in the first row of that
picture that did not fail; in the others its column is null. `geometry` is as in `Geometry`, with the box `seen`
(x0, y0, x1, y1), original pixels; characters [start, end) of an entry are those of the caption.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from grounding.core.errors import GroundingError

if TYPE_CHECKING:
    from grounding.adapter.base import Adapter
    from grounding.engine.plan import Column

# Where a table says who wrote it, in its metadata.
ABOUT = b"grounding"
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
class About:
    """What all rows of a run share: per column key the method, and what was explained how. See `MapColumn`."""

    methods: Mapping[str, Mapping[str, Any]]
    target: str
    token_target: str | None
    model: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @classmethod
    def of(cls, adapter: Adapter, plan: Sequence[Column], target: str, token_target: str | None, seed: int) -> About:
        """What the explanations of a plan will have in common."""
        # Here, as who only looks at a run needs no torch.
        from grounding.engine.warnings import provenance_of
        from grounding.explanation.serialization import plain

        methods = {
            column.key: {
                "method": column.name,
                "title": column.method.title,
                "layer": column.layer,
                "options": plain(column.options),
                "signed": column.method.signed,
                "text_conditioned": adapter.text_conditioned(target, column.method.reads_gradient),
            }
            for column in plan
        }
        model = {"id": adapter.info.id, "type": adapter.info.type}
        return cls(methods, target, token_target, model, plain(provenance_of(adapter, seed)))

    @property
    def shared(self) -> tuple[str, ...]:
        """The columns whose maps do not see the text."""
        return tuple(key for key, method in self.methods.items() if not method["text_conditioned"])

    def to_json(self) -> str:
        """One line of JSON, the same for the same content."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> About:
        """The inverse. Raises GroundingError for anything else."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise GroundingError(f"not a table of a batch run: {error}") from None


def schema(about: About) -> pa.Schema:
    """The columns of a run's tables."""
    fields = _FIELDS | dict.fromkeys(about.methods, _MAPS)
    return pa.schema(fields, metadata={ABOUT: about.to_json()})


def to_table(rows: Sequence[Row], about: About) -> pa.Table:
    """Rows as a table; what a row does not have is null."""
    return pa.Table.from_pylist(list(rows), schema=schema(about))


def maps_bytes(rows: Sequence[Row], about: About) -> int:
    """What the maps of these rows take by themselves: two bytes a patch, and four for the scale of each map."""
    stored = [maps for row in rows for key in about.methods if (maps := row.get(key)) is not None]
    return sum(len(maps["values"]) + 4 * len(maps["scales"]) for maps in stored)


def doubts_of(rows: Sequence[Row], about: About) -> Counter[str]:
    """Rows by warning, and by method that has no evidence for the caption; what else methods say stands in the rows."""
    titles = tuple(f"{method['title']} " for method in about.methods.values())
    said = Counter(w for row in rows for w in set(row.get("warnings") or ()) if not w.startswith(titles))
    for key, method in about.methods.items():
        where = f" at {method['layer']}" if method["layer"] else ""
        blank = sum(1 for row in rows if row.get(key) and row[key]["status"][0] != "ok")
        said.update({f"{method['title']}{where} has no evidence for the caption": blank} if blank else {})
    return said


def about_of(table: pa.Table | pa.Schema) -> About:
    """What a table's rows have in common. Raises GroundingError for a table that is none of ours."""
    metadata = (table if isinstance(table, pa.Schema) else table.schema).metadata or {}
    if ABOUT not in metadata:
        raise GroundingError("the table was not written by a batch run: it has no 'grounding' metadata")
    return About.from_json(metadata[ABOUT])
