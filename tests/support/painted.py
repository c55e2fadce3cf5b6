"""A model with known maps: every character is a grey level, and its Grad-CAM is where that level is."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import nn

from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.geometry import Geometry
from grounding.core.images import Picture, open_image
from grounding.core.text import Generate, TokenizedText

ROWS, COLUMNS, CELL = 2, 8, 4
CHARACTERS = " abcdefO0#"
STEP = 25
# What is painted as the one is read as the other; and what is read without any cell speaking for it.
MISREAD, UNFOUNDED = {"0": "O"}, "#"
END = len(CHARACTERS)


def painted(text):
    """An image of 32 x 8 pixels, one cell of 4 x 4 per character, in the upper row from the left."""
    levels = np.zeros((ROWS * CELL, COLUMNS * CELL), np.uint8)
    for column, sign in enumerate(text):
        levels[:CELL, column * CELL : (column + 1) * CELL] = STEP * CHARACTERS.index(sign)
    return Image.fromarray(levels).convert("RGB")


def cell_boxes(text):
    """The boxes of the characters of a painted text."""
    return [[i * CELL, 0, (i + 1) * CELL, CELL] for i in range(len(text))]


class PaintedAdapter(Adapter):
    """The score of a character is the sum over the cells of its own channel: 1 in cells that show it, else 0.

    Its gradient is the same at every cell, so Grad-CAM is the channel itself and peaks where it first stands.
    """

    kinds = ("logit",)
    token_targets = ()
    generates = True
    default_methods = ("gradcam",)

    def __init__(self):
        self.model = nn.Module()
        self.model.layer = nn.Identity()
        self.model.unused = nn.Linear(1, 1)
        self.info = ModelInfo(id="painted", type="painted")
        self.calls = 0

    @cached_property
    def structure(self):
        return ModelStructure(stacks={"vision": Stack(("layer",))}, layer="layer", pooling="mean", prefix=0)

    def prepare_images(self, images):
        self.calls += 1
        opened = tuple(image if isinstance(image, Picture) else open_image(image) for image in images)
        geometry = tuple(
            Geometry.from_steps(p.width, p.height, resized=(COLUMNS * CELL, ROWS * CELL), grid=(ROWS, COLUMNS))
            for p in opened
        )
        pixels = torch.stack([torch.from_numpy(np.array(p.pil.convert("L"))) for p in opened])
        return Inputs(opened, geometry, {"pixel_values": pixels}, ((),) * len(opened))

    def prepare_texts(self, inputs, texts):
        levels = inputs.tensors["pixel_values"][:, CELL // 2, CELL // 2 :: CELL].double() / STEP
        tokens = []
        for own, codes in zip(texts, levels.round().long().tolist(), strict=True):
            assert own == [Generate()]
            text = "".join(MISREAD.get(CHARACTERS[code], CHARACTERS[code]) for code in codes).rstrip()
            places = (*((i, i + 1) for i in range(len(text))), (len(text), len(text)))
            ids = (*(CHARACTERS.index(sign) for sign in text), END)
            tokens.append(TokenizedText(text, ids, places, (*(False for _ in text), True)))
        owner = tuple(range(len(texts)))
        origins = ("generated",) * len(texts)
        return replace(
            inputs, tokens=tuple(tokens), text_image=owner, text_warnings=((),) * len(texts), origins=origins
        )

    def targets(self, inputs, spans, kind=None, token_target=None):
        kind, token_target = self.check_kind(kind, token_target)
        owner = torch.tensor([t for t, own in enumerate(spans) for _ in own])
        flat = tuple(span for own in spans for span in own)
        channel = torch.tensor([CHARACTERS.index(span.token) if span.token else span.token_id for span in flat])
        return Targets(kind, owner, owner, flat, {"channel": channel}, token_target)

    def encode_images(self, inputs):
        pixels = inputs.tensors["pixel_values"].double()
        cells = pixels.unfold(1, CELL, CELL).unfold(2, CELL, CELL).mean((-1, -2)).flatten(1) / STEP
        shown = (cells[..., None] - torch.arange(END)).abs() < 0.5
        shown[..., CHARACTERS.index(UNFOUNDED)] = False
        return self.model.layer(shown.double())

    def score(self, inputs, encoded, targets):
        return encoded[targets.image, :, targets.data["channel"]].sum(1)
