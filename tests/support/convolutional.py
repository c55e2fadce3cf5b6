"""A third-party convolutional network: features behind an in-place ReLU, one score per class."""

from dataclasses import replace

import torch
from PIL import Image
from torch import nn

from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import ImageInputs, Inputs, Targets, View
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.geometry import Geometry
from grounding.core.images import open_image
from grounding.core.text import TokenizedText

ROWS, COLUMNS, STEP = 4, 6, 4
CLASSES = 4


class Network(nn.Module):
    """Images (B, 3, 16, 24) -> features (B, 5, 4, 6) -> scores of the classes."""

    def __init__(self, width=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, STEP, STEP), nn.ReLU(inplace=True))
        self.features = nn.Conv2d(8, width, 3, padding=1)
        self.active = nn.ReLU(inplace=True)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(width * ROWS * COLUMNS, 16), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, pixels):
        return self.head(self.hidden(self.active(self.features(self.stem(pixels)))))


class Quadrants(nn.Module):
    """Score of a class: the sum over its quadrant (0 top left, 1 top right, ...) of its channel of the features.

    A channel is 1 where the image has its one of `colours`, else 0. With a single colour all classes read that.
    """

    def __init__(self, colours):
        super().__init__()
        self.pool = nn.AvgPool2d(STEP)
        self.features = nn.Sequential(nn.Conv2d(3, len(colours), 1), nn.ReLU(inplace=True))
        with torch.no_grad():
            own = torch.tensor(colours)
            self.features[0].weight.copy_((2 * own - 1)[..., None, None])
            self.features[0].bias.copy_(1 - own.sum(1))

    def forward(self, pixels):
        found = self.features(self.pool(pixels)).expand(-1, CLASSES, -1, -1)
        return torch.stack([found[:, c, *quadrant(c)].sum((1, 2)) for c in range(CLASSES)], 1)


def quadrant(number):
    """Rows and columns of a quadrant of the grid."""
    down, across = divmod(number, 2)
    return slice(down * ROWS // 2, (down + 1) * ROWS // 2), slice(across * COLUMNS // 2, (across + 1) * COLUMNS // 2)


class ClassAdapter(Adapter):
    """A text is the number of a class; its score the class's own."""

    target_kinds = ("class",)
    token_targets = ()
    default_methods = ("gradcam",)

    def __init__(self, model=None, layer="active"):
        torch.manual_seed(0)
        self.model = (model or Network()).double().eval()
        self.info = ModelInfo(id="classes", type="classes")
        self.layer = layer

    def structure(self, kind):
        return ModelStructure({"vision": Stack((self.layer,))}, self.layer, "mean")

    def pixels(self, image):
        """Of a PIL image: (3, 16, 24), from 0 to 1."""
        resized = image.resize((COLUMNS * STEP, ROWS * STEP), Image.Resampling.BOX)
        levels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).double() / 255
        return levels.reshape(ROWS * STEP, COLUMNS * STEP, 3).movedim(-1, 0)

    def prepare_images(self, images):
        opened = tuple(open_image(image) for image in images)
        size = (COLUMNS * STEP, ROWS * STEP)
        grid = (ROWS, COLUMNS)
        geometry = tuple(Geometry.from_steps(p.width, p.height, resized=size, grid=grid) for p in opened)
        pixels = torch.stack([self.pixels(p.pil) for p in opened])
        views = tuple(View(b, own) for b, own in enumerate(geometry))
        return ImageInputs(opened, views, {"pixel_values": pixels})

    def prepare_texts(self, images, queries):
        flat = [query.text for own in queries for query in own]
        owner = tuple(b for b, own in enumerate(queries) for _ in own)
        tokens = tuple(TokenizedText(text, (int(text),), ((0, len(text)),), (False,)) for text in flat)
        return Inputs(images, tokens, owner)

    def targets(self, inputs, spans, kind, token_target=None):
        kind, token_target = self.check_target(kind, token_target)
        found = Targets.of_spans(inputs, spans, kind, token_target)
        number = torch.tensor([inputs.texts[t].ids[0] for t in found.text.tolist()])
        return replace(found, data={"class": number})

    def encode_images(self, images):
        return self.model(images.tensors["pixel_values"])

    def score(self, inputs, features, targets):
        return features[targets.image, targets.data["class"]]


def one_by_one(adapter, image, number, layer):
    """Features and gradient (P, D) of one image and class: the model's own forward and a full backward."""
    kept = {}
    module = adapter.model.get_submodule(layer)
    handle = module.register_forward_hook(lambda m, a, out: kept.update(f=out) or out.clone())
    score = adapter.model(adapter.pixels(image)[None])[0, number]
    handle.remove()
    [gradient] = torch.autograd.grad(score, kept["f"])
    return [t[0].detach().flatten(1).T.numpy() for t in (kept["f"], gradient)]
