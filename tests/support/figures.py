"""Panels, text and pixels of a finished figure, and maps with simple known figures."""

import numpy as np
from PIL import Image

from grounding.explanation.figures.overlays import overlay
from tests.support.explanations import column, explanation, whole

RAMP = np.array([[[-1, 0, 0.5, 1.0]] * 4])  # from negative (left) to positive (right)
PLAIN = {"peak": False, "box": False}


def pixels(made):
    """Pixels of the finished figure, RGB."""
    made.canvas.draw()
    return np.asarray(made.canvas.buffer_rgba())[..., :3].copy()


def images(made, start=""):
    """Panels of a figure by name."""
    found = [(i.get_gid(), np.asarray(i.get_array())) for i in made.axes[0].images if i.get_gid().startswith(start)]
    assert len(found) == len(dict(found)) or start == ""
    return dict(found)


def words(made):
    """All text of a figure, with a space between its lines."""
    return " ".join(t.get_text() for t in made.axes[0].texts)


def text_of(made):
    """All text of a figure with single spaces, independent of line breaks."""
    return " ".join(words(made).split())


def colourful(array):
    """Mask of the pixels whose red, green and blue differ."""
    array = np.asarray(array).astype(int)
    return array.max(-1) - array.min(-1) > 12


def ramp(image=None, *, signed=True, geometry=None):
    """An explanation of one entry with the map RAMP."""
    image = image or Image.new("RGB", (64, 64), (128, 128, 128))
    geometry = geometry or whole(*image.size)
    return explanation(
        image, labels=("x",), geometry=geometry, columns=[column("gradcam", RAMP, geometry, signed=signed)]
    )


def painted(made, **options):
    """The overlay of the first entry without marks."""
    return np.asarray(overlay(made.map(0), made.image, **{**PLAIN, **options})).astype(int)
