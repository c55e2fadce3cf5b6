"""Compare and edit stored results."""

from __future__ import annotations

import dataclasses
import json

from grounding.explanation.explanation import Explanation


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def edited(folder, change):
    path = folder / "explanation.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def same_as(result, original):
    """Assert that every field and every bit is equal, except for the image."""
    for field in dataclasses.fields(Explanation):
        if field.name not in ("methods", "image"):
            assert getattr(result, field.name) == getattr(original, field.name), field.name
    assert list(result.methods) == list(original.methods)
    for key, made in result.methods.items():
        for field in dataclasses.fields(made):
            if field.name != "maps":
                assert getattr(made, field.name) == getattr(original.methods[key], field.name), field.name
        assert made.maps.dtype == original.methods[key].maps.dtype
        assert made.maps.tobytes() == original.methods[key].maps.tobytes()
