"""Convert explanations to and from JSON. Key names are the same in every file and on the command line.

Coordinates: original pixels, (x, y), origin top-left; boxes (x0, y0, x1, y1), half-open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from grounding.core.errors import GroundingError
from grounding.core.files import FORMAT
from grounding.core.geometry import OVERVIEW, Geometry
from grounding.core.images import Picture
from grounding.core.printable import escape
from grounding.core.text import Alternative
from grounding.explanation.explanation import SCHEMA_VERSION, Entry, Explanation, MethodMaps, PatchMap
from grounding.explanation.maps import Status


def to_json(explanation: Explanation, files: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything but the values of the maps, as JSON types. Numbers that are not finite become null.

    `files` are the names of the files written beside the JSON.
    """
    geometry, image = explanation.geometry, explanation.image
    shared = {key: _map(explanation.map(0, key)) for key, m in explanation.methods.items() if m.shared}
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "image": {
            "path": image.path,
            "width": geometry.width,
            "height": geometry.height,
            "seen": [float(edge) for edge in geometry.seen],
            "sha256": image.sha256,
            "warnings": list(image.warnings),
            "crop": to_builtin(image.crop),
        },
        "model": {"id": None, "type": None} | to_builtin(explanation.model),
        "caption": explanation.caption,
        "origin": explanation.origin,
        "truncated": explanation.truncated,
        "target": explanation.target,
        "token_target": explanation.token_target,
        "score": to_builtin(explanation.score),
        "entries": [
            entry_json(entry)
            | {"maps": {key: shared.get(key) or _map(explanation.map(i, key)) for key in explanation.methods}}
            for i, entry in enumerate(explanation.entries)
        ],
        "methods": {
            key: {
                "method": maps.method,
                "title": maps.title,
                "layer": maps.layer,
                "options": to_builtin(maps.options),
                "signed": maps.signed,
                "text_conditioned": maps.text_conditioned,
                **_own_grid("grid", maps.maps, geometry),
                **({} if maps.overview is None else _own_grid("overview_grid", maps.overview, explanation.overview)),
            }
            for key, maps in explanation.methods.items()
        },
        "geometry": geometry.to_dict(),
        **_views(explanation),
        "warnings": list(explanation.warnings),
        "provenance": to_builtin(explanation.provenance),
        "files": to_builtin(files or {}),
    }


def _views(explanation: Explanation) -> dict[str, Any]:
    """Name and geometry of each view of the image; nothing for an image with one view."""
    views = [{"name": name, "geometry": geometry.to_dict()} for name, geometry in explanation.views.items()]
    return {"views": views} if len(views) > 1 else {}


def _own_grid(name: str, maps: np.ndarray, geometry: Geometry | None) -> dict[str, Any]:
    """Rows and columns of maps whose layer has another grid than the geometry."""
    rows, columns = maps.shape[1:]
    same = geometry is not None and (rows, columns) == (geometry.rows, geometry.columns)
    return {} if same else {name: [rows, columns]}


def entry_json(entry: Entry) -> dict[str, Any]:
    """An entry without its maps, as JSON types."""
    return {
        "label": entry.label,
        "kind": entry.kind,
        "start": entry.start,
        "end": entry.end,
        "token_id": entry.token_id,
        "score": to_builtin(entry.score),
        "probability": to_builtin(entry.probability),
        "alternatives": [to_builtin(vars(one)) for one in entry.alternatives],
    }


def dumps(value: Any) -> str:
    """JSON text in ASCII: no label can break a line, colour a terminal or fail to encode. NaN raises ValueError."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, indent=1) + "\n"


def _map(patch_map: PatchMap) -> dict[str, Any]:
    peak, box = patch_map.peak, patch_map.box
    return {
        "peak": None if peak is None else [float(v) for v in peak],
        "box": None if box is None else [int(v) for v in box],
        **_evidence(patch_map),
        "layer": patch_map.method.layer,
        "text_conditioned": patch_map.method.text_conditioned,
        **({} if patch_map.overview is None else {OVERVIEW: _evidence(patch_map.overview)}),
    }


def _evidence(patch_map: PatchMap) -> dict[str, Any]:
    low, high = patch_map.range
    return {
        "min": to_builtin(low),
        "max": to_builtin(high),
        "status": patch_map.status.status,
        "reason": patch_map.status.reason,
    }


def to_builtin(value: Any) -> Any:
    """`value` as JSON types: NumPy scalars, tuples and mappings converted, numbers that are not finite as null."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_builtin(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)
        return [to_builtin(item) for item in items]
    return str(value)


def from_json(content: Mapping[str, Any], maps: Callable[[str, str | None], np.ndarray], image: Picture) -> Explanation:
    """The inverse of `to_json`; `maps` returns the maps of a method key, of the first view or of the one named.

    Raises GroundingError if they do not fit.
    """
    geometry = Geometry.from_dict(content["geometry"])
    entries = tuple(_entry(item) for item in content["entries"])
    methods = {
        key: _method_maps(key, about, [e["maps"][key] for e in content["entries"]], maps(key, None), geometry)
        for key, about in content["methods"].items()
    }
    by_name = {view["name"]: Geometry.from_dict(view["geometry"]) for view in content.get("views", ())}
    overview = by_name.get(OVERVIEW)
    if overview is not None:
        methods = {key: _with_overview(own, content, maps(key, OVERVIEW), overview) for key, own in methods.items()}
    return Explanation(
        image=image,
        caption=content["caption"],
        entries=entries,
        methods=methods,
        geometry=geometry,
        target=content["target"],
        token_target=content["token_target"],
        model=content["model"],
        warnings=tuple(content["warnings"]),
        provenance=content["provenance"],
        origin=content.get("origin", "given"),
        truncated=content.get("truncated", False),
        overview=overview,
    )


def _entry(item: Mapping[str, Any]) -> Entry:
    # Results of earlier versions have no probabilities.
    probability = item.get("probability")
    return Entry(
        label=item["label"],
        kind=item["kind"],
        start=item["start"],
        end=item["end"],
        score=_finite(item["score"]),
        token_id=item["token_id"],
        probability=None if probability is None else float(probability),
        alternatives=tuple(
            Alternative(one["label"], one["token_id"], _finite(one["probability"]))
            for one in item.get("alternatives", ())
        ),
    )


def _finite(value: Any) -> float:
    """A number; NaN for null."""
    return math.nan if value is None else float(value)


def _method_maps(
    key: str, about: Mapping[str, Any], of_entries: list[Mapping[str, Any]], maps: np.ndarray, geometry: Geometry
) -> MethodMaps:
    stored = of_entries if about["text_conditioned"] else of_entries[:1]
    _check_maps(key, maps, len(stored), about.get("grid"), geometry)
    return MethodMaps(
        key=key,
        method=about["method"],
        title=about["title"],
        layer=about["layer"],
        options=about["options"],
        signed=about["signed"],
        text_conditioned=about["text_conditioned"],
        maps=maps,
        status=tuple(Status(item["status"], item["reason"]) for item in stored),
    )


def _with_overview(made: MethodMaps, content: Mapping[str, Any], maps: np.ndarray, geometry: Geometry) -> MethodMaps:
    stored = [entry["maps"][made.key][OVERVIEW] for entry in content["entries"]][: len(made.status)]
    _check_maps(made.key, maps, len(stored), content["methods"][made.key].get("overview_grid"), geometry)
    status = tuple(Status(item["status"], item["reason"]) for item in stored)
    return replace(made, overview=maps, overview_status=status)


def _check_maps(key: str, maps: np.ndarray, count: int, grid: Sequence[int] | None, geometry: Geometry) -> None:
    """Raise GroundingError for maps of another shape or type than stored."""
    wanted = (count, *(grid or (geometry.rows, geometry.columns)))
    if maps.shape != wanted or maps.dtype.kind != "f":
        raise GroundingError(f"the maps of {key!r} are {maps.dtype} {maps.shape}, not floating point {wanted}")


def parse(data: bytes, path: Path) -> dict[str, Any]:
    """The content of a result's JSON file. Raises GroundingError for a damaged, foreign or newer file."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise GroundingError(f"{escape(path)} is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise GroundingError(f"{escape(path)} was not written by grounding")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "; a newer version of grounding wrote it" if newer else ""
        raise GroundingError(
            f"{escape(path)} has schema version {version!r}, this version reads {SCHEMA_VERSION}{advice}"
        )
    return cast(dict[str, Any], content)
