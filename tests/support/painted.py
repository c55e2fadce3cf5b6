"""A model with known maps: every character is a grey level, and its Grad-CAM is where that level is."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import ImageInputs, Inputs, Targets, View
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

    target_kinds = ("logit",)
    token_targets = ()
    default_methods = ("gradcam",)

    def __init__(self):
        self.model = nn.Module()
        self.model.layer = nn.Identity()
        self.model.unused = nn.Linear(1, 1)
        self.info = ModelInfo(id="painted", type="painted")
        self.calls = 0

    def structure(self, kind):
        return ModelStructure({"vision": Stack(("layer",))}, "layer", "mean")

    def prepare_images(self, images):
        self.calls += 1
        opened = tuple(image if isinstance(image, Picture) else open_image(image) for image in images)
        geometry = tuple(
            Geometry.from_steps(p.width, p.height, resized=(COLUMNS * CELL, ROWS * CELL), grid=(ROWS, COLUMNS))
            for p in opened
        )
        pixels = torch.stack([torch.from_numpy(np.array(p.pil.convert("L"))) for p in opened])
        views = tuple(View(b, own) for b, own in enumerate(geometry))
        return ImageInputs(opened, views, {"pixel_values": pixels})

    def generate(self, images, features, queries):
        levels = images.tensors["pixel_values"][:, CELL // 2, CELL // 2 :: CELL].double() / STEP
        codes_of = levels.round().long().tolist()
        made = []
        for b, query in queries:
            assert query.text == Generate()
            codes = codes_of[b]
            text = "".join(MISREAD.get(CHARACTERS[code], CHARACTERS[code]) for code in codes).rstrip()
            places = (*((i, i + 1) for i in range(len(text))), (len(text), len(text)))
            ids = (*(CHARACTERS.index(sign) for sign in text), END)
            special = (*(False for _ in text), True)
            made.append(TokenizedText(text, ids, places, special, origin="generated"))
        return made

    def prepare_texts(self, images, queries):
        texts = tuple(query.text for own in queries for query in own)
        return Inputs(images, texts, tuple(b for b, own in enumerate(queries) for _ in own))

    def targets(self, inputs, spans, kind, token_target=None):
        kind, token_target = self.check_target(kind, token_target)
        found = Targets.of_spans(inputs, spans, kind, token_target)
        channel = [CHARACTERS.index(span.token) if span.token else span.token_id for span in found.spans]
        return replace(found, data={"channel": torch.tensor(channel)})

    def encode_images(self, images):
        pixels = images.tensors["pixel_values"].double()
        cells = pixels.unfold(1, CELL, CELL).unfold(2, CELL, CELL).mean((-1, -2)).flatten(1) / STEP
        shown = (cells[..., None] - torch.arange(END)).abs() < 0.5
        shown[..., CHARACTERS.index(UNFOUNDED)] = False
        return self.model.layer(shown.double())

    def score(self, inputs, features, targets):
        return features[targets.image, :, targets.data["channel"]].sum(1)
