"""Explanations of generated text lines, built from arrays without a model."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grounding.core.geometry import Geometry
from grounding.core.images import open_image
from grounding.core.text import Alternative
from grounding.explanation.explanation import Entry, Explanation
from tests.support.explanations import column


def line(width, height, text="", size=None):
    """An image of a line of text, dark on light, across its whole width."""
    from matplotlib import get_data_path

    image = Image.new("RGB", (width, height), (236, 230, 215))
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size or max(8, int(height * 0.6)))
    pen = ImageDraw.Draw(image)
    step = width / max(1, len(text))
    for i, sign in enumerate(text):
        pen.text(((i + 0.5) * step, height / 2), sign, font=font, fill=(30, 25, 40), anchor="mm")
    return image


def peaks(cells, rows, columns):
    """One map per (row, column): a Gaussian bump of height 1 at that cell; zero everywhere for None."""
    maps = np.zeros((len(cells), rows, columns), np.float32)
    y, x = np.mgrid[:rows, :columns]
    for raw, cell in zip(maps, cells, strict=True):
        if cell is not None:
            raw += np.exp(-((y - cell[0]) ** 2 + (x - cell[1]) ** 2) / 2)
    return maps


def written(
    labels, cells, *, size=(512, 64), grid=(4, 32), keys=("gradcam",), shared=(), probabilities=None,
    image=None, origin="generated", caption=None, extra=(), extra_cells=(), warnings=(), alternatives=None,
):  # fmt: skip
    """An explanation of tokens `labels` that peak at `cells`, (row, column) each, None for no evidence."""
    text = "".join(labels) if caption is None else caption
    image = open_image(image or line(*size, text))
    geometry = Geometry.from_steps(image.width, image.height, resized=(grid[1] * 16, grid[0] * 16), grid=grid)
    maps = peaks([*cells, *extra_cells], *grid)
    columns = [column(key, maps, geometry) for key in keys]
    columns += [column(key, maps[:1], geometry, signed=False, shared=True) for key in shared]
    starts = np.cumsum([0, *map(len, labels)])
    token_probabilities = probabilities or [0.98] * len(labels)
    others = (Alternative("o", 4, 0.0123), Alternative("c", 5, 0.004)) if alternatives is None else alternatives
    entries = [
        Entry(label, "token", int(starts[i]), int(starts[i + 1]), 9.5 - i, 40 + i, token_probabilities[i], others)
        for i, label in enumerate(labels)
    ]
    return Explanation(
        image=image, caption=text, entries=(*entries, *extra), methods={c.key: c for c in columns},
        geometry=geometry, target="logit", token_target=None, model={"id": "some/reader", "type": "reader"},
        warnings=tuple(warnings), provenance={"seed": 0}, origin=origin,
    )  # fmt: skip


def along(count, rows, columns):
    """Cells from left to right at half the height of the image."""
    return [(rows // 2, int((i + 0.5) * columns / count)) for i in range(count)]
