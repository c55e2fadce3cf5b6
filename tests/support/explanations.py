"""Explanations built from arrays, without a model: for tests of figures and files."""

import numpy as np
from PIL import Image

from grounding.core.geometry import Geometry
from grounding.core.images import open_image
from grounding.explanation.explanation import Entry, Explanation, MethodMaps
from grounding.explanation.maps import diagnose

LABELS = ("man in red", "man", "red")


def noise(width, height, seed=0):
    """An image of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def column(key, maps, geometry, *, signed=True, shared=False, **options):
    """Method maps of these raw maps, with their status."""
    maps = np.asarray(maps, np.float32)
    status = tuple(diagnose(m, geometry.seen_cells, signed=signed) for m in maps)
    name = key.split("@")[0]
    return MethodMaps(key, name, name.title(), "vision.11", options, signed, not shared, maps, status)


def whole(width, height, rows=4, columns=4):
    """The geometry of a model that saw the whole image."""
    return Geometry.from_steps(width, height, resized=(columns * 16, rows * 16), grid=(rows, columns))


def explanation(image=None, *, labels=LABELS, geometry=None, columns=None, caption=None, warnings=(), **fields):
    """Grad-CAM and relevance per entry, rollout shared by all; random with a fixed seed."""
    image = open_image(noise(96, 96) if image is None else image)
    geometry = geometry or whole(image.width, image.height)
    rng = np.random.default_rng(7)
    grid = geometry.rows, geometry.columns

    def random(count, low):
        return rng.uniform(low, 1, (count, *grid))

    columns = columns or (
        column("gradcam", random(len(labels), -1), geometry, threshold=0.0),
        column("rollout", random(1, 0), geometry, signed=False, shared=True, fusion="mean"),
        column("relevance", random(len(labels), 0), geometry, signed=False),
    )
    entries = tuple(
        Entry(text, "token" if i else "caption", i, i + len(text), 0.25 / (i + 1), 40 + i if i else None)
        for i, text in enumerate(labels)
    )
    return Explanation(
        image=image,
        caption=labels[0] if caption is None else caption,
        entries=entries,
        methods={c.key: c for c in columns},
        geometry=geometry,
        target="similarity",
        token_target="leave-one-out",
        model={"id": "some/model", "type": "clip"},
        warnings=tuple(warnings),
        provenance=fields.pop("provenance", {"seed": 0, "versions": {"grounding": "0.1.0"}}),
        **fields,
    )
