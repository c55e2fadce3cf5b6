"""Layers of any module that look like feature maps of the image and are none: found by their response to changes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from adapters.module.adapter import ModuleAdapter
from adapters.module.spatial_response import is_spatial
from grounding import explain
from grounding.core.errors import LayerError
from tests.support import models
from tests.support.contract import default_layer, structure
from tests.support.images import noise

SIDE = 64
SPOT = (9, 50)  # of an image of 64 x 64, (x, y): in cell (6, 1) of 8 x 8


def made(net, layer=None, **options):
    torch.manual_seed(0)
    return ModuleAdapter(net().eval(), layer, preprocess=models.to_pixels(SIDE, SIDE), **options)


# ---------------------------------------------------------------- cases known on paper


def moved(places, rows=8, columns=8):
    """Changes of 1 at (row, column) for each quarter of the image, 0.01 elsewhere."""
    change = torch.full((4, rows, columns), 0.01)
    for own, (row, column) in zip(change, places, strict=True):
        own[row, column] = 1
    return change


def test_cells_that_lie_as_the_image_does():
    assert is_spatial(moved([(1, 1), (1, 6), (6, 1), (6, 6)]))
    assert is_spatial(moved([(0, 3), (2, 4), (5, 2), (7, 7)]))
    assert is_spatial(moved([(0, 1), (0, 16), (0, 1), (0, 16)], 1, 20))  # one row: no up and down
    assert is_spatial(moved([(1, 0), (1, 0), (16, 0), (16, 0)], 20, 1))
    everywhere = torch.rand(8, 8) * 50  # some cells always move more than others
    assert is_spatial(moved([(1, 1), (1, 6), (6, 1), (6, 6)]) * everywhere)


@pytest.mark.parametrize(
    "places",
    [
        [(1, 6), (1, 1), (6, 6), (6, 1)],  # mirrored
        [(6, 1), (6, 6), (1, 1), (1, 6)],  # upside down
        [(1, 1), (6, 1), (1, 6), (6, 6)],  # rows for columns
        [(3, 3), (3, 3), (3, 3), (3, 3)],  # whatever moves
        [(1, 1), (1, 2), (6, 5), (6, 6)],  # by the number of the token alone
    ],
)
def test_cells_that_do_not(places):
    assert not is_spatial(moved(places))


def test_weights_between_tokens_move_in_rows_and_columns():
    """Rows and columns of the tokens of a quarter: the first half of the tokens is the upper half of the image."""
    weights = torch.full((4, 64, 64), 0.01)
    for own, (row, column) in zip(weights, [(1, 1), (1, 6), (6, 1), (6, 6)], strict=True):
        own[row * 8 + column], own[:, row * 8 + column] = 1, 1
    assert not is_spatial(weights)


def test_what_never_changes_and_few_cells():
    assert not is_spatial(torch.zeros(4, 8, 8))
    assert not is_spatial(torch.zeros(4, 2, 2))
    assert is_spatial(moved([(0, 0)] * 4, 2, 2))  # each cell sees nearly everything


# ---------------------------------------------------------------- modules


class Weights(nn.Module):
    """Attention whose weights pass a module: (B, 1, 64, 64), the shape of a map of a square image."""

    def __init__(self, classes=3):
        super().__init__()
        self.patch, self.softmax, self.head = nn.Conv2d(3, 8, 8, 8), nn.Softmax(-1), nn.Linear(8, classes)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)[:, None]
        weights = self.softmax(tokens @ tokens.transpose(-1, -2))
        return self.head((weights @ tokens)[:, 0].mean(1))


class Scores(nn.Module):
    """The same before the softmax, where rows sum to anything."""

    def __init__(self, classes=3):
        super().__init__()
        self.patch, self.scaled, self.head = nn.Conv2d(3, 8, 8, 8), nn.Identity(), nn.Linear(8, classes)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)[:, None]
        weights = self.scaled(tokens @ tokens.transpose(-1, -2)).softmax(-1)
        return self.head((weights @ tokens)[:, 0].mean(1))


class Channels(nn.Module):
    """(B, channels, cells) with as many channels as cells: the shape of tokens."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.flat, self.head = nn.Conv2d(3, 64, 8, 8), nn.Flatten(2), nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.flat(torch.relu(self.conv(x))).mean(-1))


class Windows(nn.Module):
    """Tokens window by window (4 x 4 cells each), not row by row."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, x):
        tokens = self.conv(x).unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 3, 5, 2, 4, 1).flatten(1, 4)
        return self.head(self.norm(tokens).relu().mean(1))


class Table(nn.Module):
    """A square table that no image changes, beside the maps."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(3, 8, 8, 8), nn.Tanh(), nn.Linear(8, classes)
        self.bias = nn.Parameter(torch.randn(1, 1, 16, 16))

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3))) * self.table(self.bias).mean()


class Segments(nn.Module):
    """A second output behind the one that classes are made of."""

    def __init__(self, classes=3):
        super().__init__()
        self.down, self.head, self.up = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, classes), nn.ConvTranspose2d(8, 1, 8, 8)

    def forward(self, x):
        features = self.down(x).relu()
        return {"logits": self.head(features.mean((2, 3))), "mask": self.up(features)}


class Pairs(nn.Module):
    """Weights without heads, (B, N, N), beside tokens: as many tokens as they are."""

    def __init__(self, classes=3):
        super().__init__()
        self.patch, self.norm, self.softmax = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Softmax(-1)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        tokens = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        return self.head((self.softmax(tokens @ tokens.transpose(1, 2)) @ tokens).relu().mean(1))


@pytest.mark.parametrize(
    ("net", "live", "other", "words"),
    [
        (Weights, "patch", "softmax", r"\(64 x 64\)"),
        (Scores, "patch", "scaled", r"\(64 x 64; a changed quarter of the image does not change that quarter of it"),
        (Channels, "conv", "flat", r"\(its output is \(1, 64, 64\); a changed quarter"),
        (Windows, "conv", "norm", r"\(its output is \(1, 64, 8\); a changed quarter"),
        (Table, "conv", "table", r"\(16 x 16; a changed quarter"),
        (Pairs, "norm", "softmax", r"\(its output is \(1, 64, 64\)\)"),
    ],
)
def test_what_only_looks_like_a_map_is_no_tap(net, live, other, words):
    adapter = made(net)
    assert (default_layer(adapter), structure(adapter).prefix) == (live, 0)
    assert other not in structure(adapter).stacks["vision"].blocks
    named = rf"layer '{other}' has no spatial size {words}.*: the last layer that has one is '{live}' \(8 x 8\)"
    with pytest.raises(LayerError, match=named):
        made(net, other)
    with pytest.raises(LayerError, match=named):
        explain(adapter, noise(SIDE, SIDE, 1), target=0, layers=[other], methods="gradcam")


@pytest.mark.parametrize("net", [Weights, Channels, Table, Segments])
def test_a_bright_spot_is_where_it_is(net):
    """Every net reads light: whatever its shapes, the strongest cell is that of the spot."""
    adapter = made(net)
    with torch.no_grad():
        for parameter in adapter.model.parameters():
            parameter.abs_()
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[SPOT[1] - 2 : SPOT[1] + 2, SPOT[0] - 1 : SPOT[0] + 3] = 255
    found = explain(adapter, Image.fromarray(image), target=0, methods="hirescam")
    assert found.methods["hirescam"].maps.shape == (1, 8, 8)
    row, column = np.unravel_index(found.methods["hirescam"].maps[0].argmax(), (8, 8))
    assert (row, column) == (6, 1)


def test_the_tap_is_the_last_layer_that_classes_are_made_of():
    adapter = made(Segments)
    assert structure(adapter).stacks["vision"].blocks == ("down", "up")
    assert default_layer(adapter) == "down"
    with pytest.raises(LayerError, match=r"layer 'up' is dead.*use 'down', or see --list-layers"):
        explain(adapter, noise(SIDE, SIDE, 1), target=0, layers=["up"], methods="gradcam")


class Hybrid(nn.Module):
    """A stem with a grid of its own, then tokens, four of which are merged to one, then a class token."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem, self.fine, self.merge = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Conv2d(8, 16, 2, 2)
        self.block, self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, classes)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x):
        fine = self.fine(self.stem(x).flatten(2).transpose(1, 2))
        maps = self.merge(fine.transpose(1, 2).unflatten(2, (16, 16)))
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), maps.flatten(2).transpose(1, 2)], 1)
        return self.head(self.block(tokens)[:, 0])


@pytest.mark.parametrize("layer", [None, "stem", "merge"])
def test_layers_of_a_hybrid_keep_their_grids(layer):
    adapter = made(Hybrid, layer)
    assert structure(adapter).prefix == 1
    assert default_layer(adapter) == layer or default_layer(adapter) in ("block", "block.norm1", "merge")
    found = explain(adapter, noise(90, 60, 1), target=0, layers=["stem", "merge"], methods="gradcam")
    assert [column.maps.shape for column in found.methods.values()] == [(1, 16, 16), (1, 8, 8)]


def test_tokens_before_they_are_merged():
    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
            self.merge, self.head = nn.Conv2d(8, 16, 2, 2), nn.Linear(16, 3)

        def forward(self, x):
            tokens = self.norm(self.patch(x).flatten(2).transpose(1, 2))
            return self.head(self.merge(tokens.transpose(1, 2).unflatten(2, (16, 16))).mean((2, 3)))

    for layer, shape in (("norm", (1, 16, 16)), (None, (1, 8, 8))):
        found = explain(made(Merging, layer), noise(90, 60, 1), target=0, methods="gradcam")
        assert found.methods["gradcam"].maps.shape == shape


def test_of_an_attention_the_layer_is_taken_that_it_reads():
    vit = models.classifier_model("vit", dtype=torch.float32)
    adapter = ModuleAdapter(vit, preprocess=models.to_pixels(32, 32), prefix=1)
    assert default_layer(adapter).endswith("layernorm_before")
