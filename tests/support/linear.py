"""A model with known maps: the score is linear in the pixels, with one weight per patch and text."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.geometry import Geometry
from grounding.core.images import Picture, open_image
from grounding.core.text import TokenizedText, word_spans

ROWS, COLUMNS, PATCH = 4, 5, 2


class LinearAdapter(Adapter):
    """`weights[text]` (rows, columns): what a white patch adds to the score; a black one adds nothing.

    `shown` columns of the grid show the image, the others are white padding.
    """

    kinds = ("similarity",)

    def __init__(self, weights, shown=COLUMNS):
        self.model = nn.Identity()
        self.model.layer = nn.Linear(2, 2).double()
        self.weights, self.shown = weights, shown
        self.info = ModelInfo(id="linear", type="linear")

    @cached_property
    def structure(self):
        return ModelStructure(stacks={"vision": Stack(("layer",))}, layer="layer", pooling="mean", prefix=0)

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
        tensors = {"pixel_values": torch.from_numpy(pixels)}
        return Inputs(opened, geometry, tensors, ((),) * len(opened))

    def prepare_texts(self, inputs, texts):
        flat = [text for own in texts for text in own]
        tokens = tuple(
            TokenizedText(t, tuple(range(len(word_spans(t)))), word_spans(t), (False,) * len(word_spans(t)))
            for t in flat
        )
        owner = tuple(b for b, own in enumerate(texts) for _ in own)
        return replace(inputs, tokens=tokens, text_image=owner, text_warnings=((),) * len(flat))

    def targets(self, inputs, spans, kind=None, token_target=None):
        kind, token_target = self.check_kind(kind, token_target)
        owner = torch.arange(len(inputs.tokens))
        seeds = torch.stack([torch.from_numpy(np.asarray(self.weights[t.text], float)) for t in inputs.tokens])
        image = torch.tensor(inputs.text_image)
        return Targets(kind, image, owner, tuple(s for own in spans for s in own), {"seeds": seeds}, token_target)

    def encode_images(self, inputs):
        pixels = inputs.tensors["pixel_values"][:, 0]
        return pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).mean((-1, -2))  # (B, rows, columns)

    def score(self, inputs, encoded, targets):
        return (encoded[targets.image] * targets.data["seeds"]).sum((1, 2))
