"""Inspections made by hand from arrays: for tests of what is drawn and written, without a model."""

import numpy as np

from grounding.core.images import open_image
from grounding.explanation.explanation import Entry
from grounding.explanation.inspection import Inspection
from tests.support.explanations import noise, whole


def inspection(rows=3, columns=4, width=20, label="jacket", image=None, geometry=None, **fields):
    """Channel d has the weight d - 8.9 and a gradient that is the same in every cell."""
    image = open_image(image or noise(80, 60))
    geometry = geometry or whole(image.width, image.height, rows, columns)
    features = np.random.default_rng(0).normal(size=(rows, columns, width)).astype(np.float32)
    weights = (np.arange(width) - 8.9).astype(np.float32)
    gradients = np.broadcast_to(weights, features.shape)
    given = {
        "image": image, "caption": "man in red jacket", "geometry": geometry,
        "layer": "vision.encoder.layers.3.norm", "entry": Entry(label, "token", 0, 3, 0.25), "title": "Grad-CAM",
        "features": features, "gradients": gradients,
        "weights": weights, "map": features @ weights, "target": "similarity", "model": {"id": "some/model"},
    }  # fmt: skip
    return Inspection(**given | fields)
