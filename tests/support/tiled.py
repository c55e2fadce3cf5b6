"""Third-party architectures whose images are tiles with a thumbnail, or patches of all images in one packed axis."""

from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grounding.adapter.inputs import DETAIL, OVERVIEW, ImageInputs, View
from grounding.adapter.patch_tokens import PatchTokens, row_major
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.errors import LayerError
from grounding.core.geometry import Geometry
from grounding.core.images import Picture, open_image
from tests.support.third_party import COLUMNS, HEADS, PATCH, ROWS, WIDTH, MeanAdapter, MeanModel

TILE = ROWS * COLUMNS


def pixels_of(image, columns, rows):
    """(3, rows * PATCH, columns * PATCH) from 0 to 1 of a PIL image, squashed."""
    size = (columns * PATCH, rows * PATCH)
    return torch.from_numpy(np.asarray(image.resize(size, Image.Resampling.BOX)).copy()).movedim(-1, 0).double() / 255


def tiling(image):
    """(down, across) tiles: 2 x 2, of a wide image 1 x 2, of a small one none beside the whole."""
    if max(image.size) < 40:
        return (1, 1)
    return (1, 2) if image.width > 1.5 * image.height else (2, 2)


class TiledAdapter(MeanAdapter):
    """Images are tiles in the leading axis, and a thumbnail before them if there are several; their mean is read.

    Tensors are packed: `pixel_values` (sum of tiles, 3, H, W).
    """

    def prepare_images(self, images):
        opened = tuple(map(_opened, images))
        views, tiles, counts = [], [], []
        for b, picture in enumerate(opened):
            down, across = tiling(picture.pil)
            whole = pixels_of(picture.pil, across * COLUMNS, down * ROWS)
            own = list(rearrange(whole, "c (d h) (a w) -> (d a) c h w", d=down, a=across))
            views.append(View(b, _squashed(picture, down * ROWS, across * COLUMNS)))
            if len(own) > 1:
                own.insert(0, pixels_of(picture.pil, COLUMNS, ROWS))
                views.append(View(b, _squashed(picture, ROWS, COLUMNS), OVERVIEW))
            tiles += own
            counts.append(len(own))
        return ImageInputs(
            opened, tuple(views), {"pixel_values": torch.stack(tiles)}, packed={"pixel_values": tuple(counts)}
        )

    def patch_tokens(self, path, inputs, shape):
        """A mosaic of tiles each, and the thumbnail."""
        if tuple(shape[:2]) != (sum(inputs.images.packed["pixel_values"]), TILE):
            raise LayerError(f"shape {shape} is not one of tiles of {TILE} patches")
        found, first = [], 0
        for b, count in enumerate(inputs.images.packed["pixel_values"]):
            overview = inputs.images.view(b, OVERVIEW)
            if overview is not None:
                found.append(PatchTokens(overview, None, row_major(ROWS, COLUMNS, first * TILE)))
            begin = (first + (overview is not None)) * TILE
            down, across = tiling(inputs.images.images[b].pil)
            tokens = begin + np.arange(down * across * TILE).reshape(down, across, ROWS, COLUMNS)
            mosaic = rearrange(tokens, "d a r c -> (d r) (a c)")
            found.append(PatchTokens(inputs.images.view(b, DETAIL), None, mosaic))
            first += count
        return tuple(found)

    def encode_images(self, images):
        embedded = self.model(images.tensors["pixel_values"])
        return torch.stack([own.mean(0) for own in embedded.split(images.packed["pixel_values"])])


class Brightness(nn.Module):
    """Without attention: the first channel of a patch is its mean brightness, the others are zero."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.tokens = nn.Identity()
        with torch.no_grad():
            self.stem.weight.zero_()[0] = 1 / (3 * PATCH * PATCH)
            self.stem.bias.zero_()

    def forward(self, pixels):
        return self.tokens(rearrange(self.stem(pixels), "b d r c -> b (r c) d")).mean(1)


class BrightAdapter(TiledAdapter):
    """Tiles without attention; the target `norm` is the mean brightness."""

    default_methods = ("gradcam",)

    def __init__(self):
        super().__init__()
        self.model = Brightness().double().eval()

    def structure(self, kind):
        return ModelStructure({"vision": Stack(("tokens",))}, "tokens", "mean")


class PackedAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        q, k, v = rearrange(self.qkv(x)[None], "b n (three h d) -> three b h n d", three=3, h=HEADS)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out = attend(self, q, k, v, mask, scaling=(WIDTH // HEADS) ** -0.5, is_causal=False)[0]
        return self.out(out[0].flatten(1))


class PackedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), PackedAttention(config)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        x = x + self.attend(self.norm(x), mask)
        return x + self.mlp(x).relu()


class PackedModel(nn.Module):
    """Patches (sum of patches, 3 * PATCH ** 2) of all images in one axis, attention within an image: (sum, D)."""

    def __init__(self):
        super().__init__()
        self.config = MeanModel().config
        self.stem = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.blocks = nn.ModuleList([PackedBlock(self.config), PackedBlock(self.config)])
        self.words = nn.EmbeddingBag(97, WIDTH, mode="sum")

    def forward(self, patches, counts):
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        mask = torch.zeros(1, 1, len(patches), len(patches), dtype=patches.dtype)
        mask.masked_fill_(owner[:, None] != owner[None], -torch.inf)
        x = self.stem(patches)
        for block in self.blocks:
            x = block(x, mask)
        return x


class PackedAdapter(MeanAdapter):
    """No batch axis: the patches of all images follow each other, each image with a grid of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.model = PackedModel().double().eval()

    def prepare_images(self, images):
        opened = tuple(map(_opened, images))
        grids = [(max(1, p.height // 12), max(1, p.width // 12)) for p in opened]
        patches = [
            rearrange(pixels_of(p.pil, c, r), "n (r h) (c w) -> (r c) (n h w)", r=r, c=c)
            for p, (r, c) in zip(opened, grids, strict=True)
        ]
        views = tuple(View(b, _squashed(p, *grid)) for b, (p, grid) in enumerate(zip(opened, grids, strict=True)))
        counts = tuple(map(len, patches))
        return ImageInputs(opened, views, {"patches": torch.cat(patches)}, packed={"patches": counts})

    def patch_tokens(self, path, inputs, shape):
        """One index matrix per image, one after the other."""
        found, first = [], 0
        if sum(inputs.images.packed["patches"]) not in shape[:2]:
            raise LayerError(f"shape {shape} is not one of packed patches")
        for v, view in enumerate(inputs.images.views):
            rows, columns = view.geometry.rows, view.geometry.columns
            found.append(PatchTokens(v, None, row_major(rows, columns, first)))
            first += rows * columns
        return tuple(found)

    def encode_images(self, images):
        counts = images.packed["patches"]
        states = self.model(images.tensors["patches"], counts)
        return torch.stack([own.mean(0) for own in states.split(counts)])


def _opened(image):
    return image if isinstance(image, Picture) else open_image(image)


def _squashed(picture, rows, columns):
    size = (columns * PATCH, rows * PATCH)
    return Geometry.from_steps(picture.width, picture.height, resized=size).with_grid(rows, columns)


def one_view(explanation):
    """The same explanation without its second view."""
    methods = {key: replace(own, overview=None, overview_status=()) for key, own in explanation.methods.items()}
    return replace(explanation, methods=methods, overview=None)
