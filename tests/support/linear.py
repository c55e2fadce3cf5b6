"""A model with known maps: the score is linear in the pixels, with one weight per patch and text."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import ImageInputs, Inputs, Targets, View
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.geometry import Geometry
from grounding.core.images import Picture, open_image
from grounding.core.text import TokenizedText, word_spans

ROWS, COLUMNS, PATCH = 4, 5, 2


class LinearAdapter(Adapter):
    """`weights[text]` (rows, columns): what a white patch adds to the score; a black one adds nothing.

    `shown` columns of the grid show the image, the others are white padding.
    """

    target_kinds = ("similarity",)

    def __init__(self, weights, shown=COLUMNS):
        self.model = nn.Identity()
        self.model.layer = nn.Linear(2, 2).double()
        self.weights, self.shown = weights, shown
        self.info = ModelInfo(id="linear", type="linear")

    def structure(self, kind):
        return ModelStructure({"vision": Stack(("layer",))}, "layer", "mean")

    def prepare_images(self, images):
        opened = tuple(image if isinstance(image, Picture) else open_image(image) for image in images)
        size = (self.shown * PATCH, ROWS * PATCH)
        pixels = np.ones((len(opened), 1, ROWS * PATCH, COLUMNS * PATCH))
        for own, one in zip(pixels, opened, strict=True):
            own[0, :, : size[0]] = np.asarray(one.pil.convert("L").resize(size)) / 255
        geometry = tuple(
            Geometry.from_steps(
                p.width, p.height, resized=size, pad=(0, 0, COLUMNS * PATCH, ROWS * PATCH), grid=(ROWS, COLUMNS)
            )
            for p in opened
        )
        views = tuple(View(b, own) for b, own in enumerate(geometry))
        return ImageInputs(opened, views, {"pixel_values": torch.from_numpy(pixels)})

    def prepare_texts(self, images, queries):
        flat = [query.text for own in queries for query in own]
        tokens = tuple(
            TokenizedText(t, tuple(range(len(word_spans(t)))), word_spans(t), (False,) * len(word_spans(t)))
            for t in flat
        )
        return Inputs(images, tokens, tuple(b for b, own in enumerate(queries) for _ in own))

    def targets(self, inputs, spans, kind, token_target=None):
        kind, token_target = self.check_target(kind, token_target)
        seeds = torch.stack([torch.from_numpy(np.asarray(self.weights[t.text], float)) for t in inputs.texts])
        return replace(Targets.of_spans(inputs, spans, kind, token_target), data={"seeds": seeds})

    def encode_images(self, images):
        pixels = images.tensors["pixel_values"][:, 0]
        return pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).mean((-1, -2))  # (B, rows, columns)

    def score(self, inputs, features, targets):
        return (features[targets.image] * targets.data["seeds"]).sum((1, 2))
