"""Any module: its layers, in-place operations, and the geometry of its preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from adapters.module.adapter import ModuleAdapter
from grounding import explain
from grounding.core.errors import LayerError, ModelError, OptionError, ProbeError, TargetError
from grounding.engine.layers import list_layers
from grounding.engine.queries import prepare
from grounding.engine.signals import scores
from tests.support import models, nets
from tests.support.contract import default_layer
from tests.support.images import noise
from tests.support.model_state import disturb, snapshot, unchanged
from tests.support.oracles import vision
from tests.support.tolerances import TUTORIAL, close
from tests.support.tutorials.module import made, tutorial

IMAGES = [noise(90, 60, 1), noise(40, 70, 2), noise(64, 64, 3)]


@pytest.mark.parametrize(
    ("net", "layer", "path", "size"),
    [
        (nets.Vgg, "features.28", "features.28", (64, 96)),
        (nets.Vgg, None, "features", (64, 96)),
        (nets.Vgg, -4, "features.28", (64, 96)),
        (nets.Vgg, "children:0", "features", (64, 64)),
        (nets.ResNet34, "children:-3", "layer4", (64, 96)),
        (nets.ResNet34, None, "layer4", (64, 96)),
        (nets.ResNet34, "layer2", "layer2", (64, 64)),
        (nets.MobileNet, None, "features", (96, 64)),
        (nets.MobileNet, "features.2", "features.2", (64, 64)),
        (nets.ViT, "encoder.layers.2.ln_1", "encoder.layers.2.ln_1", (32, 48)),
        (nets.ViT, "encoder.layers.0", "encoder.layers.0", (32, 48)),
        (models.TwoEnds, "features.1", "features.1", (32, 48)),
        (models.TwoEnds, None, "same", (32, 48)),
    ],
)
def test_gradcam_equals_the_oracle(net, layer, path, size):
    """Three images, each with a class of its own, non-square input; the modules have their ReLUs in place."""
    adapter = made(net(), layer, width=size[1], height=size[0])
    assert default_layer(adapter) == path
    found = explain(adapter, IMAGES, [3, 0, 4], methods=["gradcam"])
    for image, index, explanation in zip(IMAGES, (3, 0, 4), found, strict=True):
        features, gradient = tutorial(adapter.model, adapter.preprocess(image), index, path)
        prefix = 2 if net is nets.ViT else 0
        pair = [(t.flatten(1).T if t.ndim == 3 else t[prefix:]).numpy() for t in (features, gradient)]
        assert close(explanation[0].raw.ravel(), vision.gradcam(*pair))
        assert explanation.geometry.seen == (0, 0, *image.size)


@pytest.mark.parametrize("net", [nets.Vgg, nets.ResNet34, nets.ViT, models.TwoEnds])
def test_the_users_model_is_as_before(net):
    adapter = made(net())
    disturb(adapter.model)
    source = repr(adapter.model)
    before = snapshot(adapter.model)
    explain(adapter, IMAGES[:2], target=[0, 1], methods=["gradcam", "hirescam"])
    list_layers(adapter, IMAGES[0])
    ModuleAdapter(adapter.model, preprocess=adapter.preprocess)
    assert unchanged(before, snapshot(adapter.model))
    assert repr(adapter.model) == source
    assert "inplace=True" in source or net is nets.ViT


@pytest.mark.parametrize("quadrant", range(4))
def test_a_score_of_one_quadrant_has_its_map_there(quadrant):
    """On an image and an input that are not square, in original pixels."""
    image, size = noise(90, 60, 4), {"width": 64, "height": 32}
    (row, column), (height, width) = divmod(quadrant, 2), (4, 8)
    own = np.zeros((2 * height, 2 * width), bool)
    own[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
    all_maps = explain(made(nets.Quadrants(own_map=False), **size), image, target=quadrant, methods=["hirescam"])[0]
    assert all_maps.raw.shape == own.shape == (8, 16)
    assert not all_maps.raw[~own].any()
    assert (all_maps.raw[own] > 0).all()
    x0, y0, x1, y1 = all_maps.box
    assert (45 * column - 3 <= x0, x1 <= 45 * (column + 1) + 3) == (True, True)
    assert (30 * row - 4 <= y0, y1 <= 30 * (row + 1) + 4) == (True, True)
    x, y = all_maps.peak
    assert (x // 45, y // 30) == (column, row)


def test_gradcam_of_a_score_of_one_quadrant():
    """Grad-CAM weighs whole maps: a map that is lit in one quadrant alone is its map."""
    adapter = made(nets.Quadrants(), width=64, height=32)
    dark = Image.new("RGB", (90, 60))
    dark.paste((255, 255, 255), (45, 0, 90, 30))
    found = explain(adapter, dark, target=1, methods=["gradcam"])[0]
    inside = np.zeros((8, 16), bool)
    inside[:4, 8:] = True
    assert found.raw[inside].min() > 2 * found.raw[~inside].max()
    assert found.peak[0] > 45
    assert found.peak[1] < 30


def test_a_layer_of_one_cell_names_the_last_with_a_size():
    adapter = made(nets.MobileNet(), width=32, height=32, preprocess=models.to_pixels(32, 32))
    assert default_layer(adapter) == "features.3"
    for layer in ("features", "features.4", "children:0"):
        with pytest.raises(
            LayerError, match=r"no spatial size \(1 x 1\): the last layer that has one is 'features.3' \(2 x 2\)"
        ):
            made(nets.MobileNet(), layer, preprocess=models.to_pixels(32, 32))
    with pytest.raises(LayerError, match=r"'classifier' has no spatial size \(its output is \(1, 5\)\): the last"):
        made(nets.MobileNet(), "classifier")
    with pytest.raises(LayerError, match="ran twice"):
        explain(made(nets.ResNet34(), "layer1.0.relu"), IMAGES[0])
    for layer, words in (("features.9", "has no layer 'features.9'"), ("-99", "the vision stack has"), (99, "blocks")):
        with pytest.raises(LayerError, match=words):
            made(nets.MobileNet(), layer)


def test_inputs_of_any_size_and_too_small_ones():
    """A transform that does not resize: every image size has its grid; one that leaves a single cell is refused."""

    def plain(image):
        return torch.from_numpy(np.asarray(image).astype(np.float64).transpose(2, 0, 1) / 255)

    adapter = made(nets.MobileNet(), preprocess=plain)
    shapes = [
        explain(adapter, noise(*size), target=1).methods["gradcam"].maps.shape[1:] for size in ((96, 64), (65, 130))
    ]
    assert shapes == [(2, 3), (5, 3)]
    with pytest.raises(LayerError, match=r"'features' has no spatial size \(1 x 1\): the last layer .* \(2 x 2\)"):
        explain(adapter, noise(32, 32), target=1)
    with pytest.raises(ModelError, match="use batch_size=1"):
        explain(adapter, [noise(96, 64), noise(64, 96)], target=1)


def test_grey_images():
    options = {"preprocess": models.to_pixels(48, 32, "L"), "mode": "L", "labels": models.CLASSES}
    adapter = made(models.TwoEnds(channels=1), **options)
    found = explain(adapter, IMAGES[0], target="red car")
    assert found.methods["gradcam"].maps.shape == (1, 8, 12)
    assert found.geometry.seen == (0, 0, 90, 60)
    with pytest.raises(
        ModelError, match="returns 3 channels, the first convolution of TwoEnds takes 1; mode='L' gives it"
    ):
        made(models.TwoEnds(channels=1))
    with pytest.raises(ModelError, match=r"returns 1 channels, the first convolution of TwoEnds takes 3$"):
        made(models.TwoEnds(), **options)
    with pytest.raises(ModelError, match=r"unknown image mode 'CMYK' \(there are: RGB, L\)"):
        made(models.TwoEnds(), mode="CMYK")


def test_the_geometry_of_a_callable_is_measured():
    """Shortest edge to 40, centre crop 32: the sides of a wide image were never seen."""

    def transform(image):
        scale = 40 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        return models.to_pixels(32, 32)(image.crop((left, top, left + 32, top + 32)))

    found = explain(made(models.TwoEnds(), preprocess=transform), noise(160, 80), target=1)
    assert found.geometry.seen == pytest.approx((48, 8, 112, 72), abs=0.3)
    assert np.isnan(found[0].heat()[:, :40]).all()
    with pytest.raises(ProbeError, match="mirrored"):
        explain(made(models.TwoEnds(), preprocess=lambda p: transform(p).flip(-1)), noise(160, 80), target=1)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (None, ("class 0", "class 1", "class 2", "class 3", "class 4")),
        (list("abcde"), ("a", "b", "c", "d", "e")),
        ({4: "e", 0: "a", 1: "b", 2: "c", 3: "d"}, ("a", "b", "c", "d", "e")),
    ],
)
def test_labels(labels, names):
    adapter = made(nets.MobileNet(), labels=labels)
    assert adapter.class_names.names == names
    assert explain(adapter, IMAGES[0], target=names[2]).entries[0].label == names[2]


def test_wrong_labels_and_models_are_refused():
    for labels in (["a"], {1: "a"}, {"zero": "a"}):
        with pytest.raises(ModelError, match="classes, the model returns 5 scores: give one name for each"):
            made(nets.MobileNet(), labels=labels)
    with pytest.raises(ModelError, match="needs a torch module, got str"):
        ModuleAdapter("resnet", preprocess=models.to_pixels())
    with pytest.raises(ModelError, match=r"returns \(1, 3, 64, 64\), expected scores"):
        made(nn.Identity())
    with pytest.raises(ModelError, match=r"preprocess returns \(64, 64\), expected"):
        made(nets.MobileNet(), preprocess=lambda p: torch.zeros(64, 64))
    with pytest.raises(LayerError, match="Sequential has no layer with a spatial size at 64 x 64"):
        made(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)))
    with pytest.raises(TargetError, match="no class 7: its 5 classes"):
        explain(made(nets.MobileNet()), IMAGES[0], target=7)
    with pytest.raises(
        OptionError, match=r"'rollout' reads vision attention, which nn.Module does not have: it has none"
    ):
        explain(made(nets.MobileNet()), IMAGES[0], methods=["rollout"])
    with pytest.raises(OptionError, match="attention of an unknown module cannot be recorded"):
        explain(made(nets.ViT()), IMAGES[0], methods=["rollout"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, "features"),
        lambda y: [y],
        lambda y: {"logits": y, "other": None},
        lambda y: {"out": y},
        lambda y: type("Output", (), {"logits": y})(),
        lambda y: y[:, :, None, None],
    ],
)
def test_answers_of_any_kind(wrap):
    found = explain(made(nets.Answers(wrap)), IMAGES[0], target=1)
    assert close(found[0].raw, explain(made(nets.Answers(lambda y: y)), IMAGES[0], target=1)[0].raw)


@pytest.mark.parametrize("wrap", [lambda y: None, lambda y: {}, lambda y: (), lambda y: y[0]])
def test_answers_without_scores(wrap):
    with pytest.raises(ModelError, match=r"the model returns .*, expected scores of shape"):
        made(nets.Answers(wrap))


def test_one_score_is_a_yes():
    found = explain(made(nets.MobileNet(classes=1)), IMAGES[0])
    entry = found.entries[0]
    assert (entry.label, entry.alternatives) == ("class 0", ())
    assert entry.probability == pytest.approx(float(torch.tensor(entry.score).sigmoid()))


def test_models_that_normalise_over_the_batch_take_one_image():
    net = nets.MobileNet()
    net.features[0][1] = nn.BatchNorm2d(4, track_running_stats=False)
    adapter = made(net)
    with pytest.raises(ModelError, match="BatchNorm2d has no running statistics: images would change each other"):
        explain(adapter, IMAGES, target=1)
    assert len(explain(adapter, IMAGES, target=1, batch_size=1)) == 3


class InPlaceInput(nn.Module):
    """Normalises its input in place and has no parameters."""

    def forward(self, x):
        x.sub_(0.5)
        total = self.pool(x).sum((1, 2, 3))
        return torch.stack([total, -total], 1)

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(8)


def test_a_model_that_changes_its_input_and_has_no_parameters():
    adapter = ModuleAdapter(InPlaceInput(), preprocess=lambda p: models.to_pixels()(p).float())
    inputs = prepare(adapter, [IMAGES[0]], [["class 1"]])
    before = inputs.images.tensors["pixel_values"].clone()
    targets = adapter.targets(inputs, [tokens.class_spans() for tokens in inputs.texts], "class")
    assert scores(adapter, inputs, targets).tolist() == scores(adapter, inputs, targets).tolist()
    assert torch.equal(before, inputs.images.tensors["pixel_values"])
    found = explain(adapter, IMAGES[0], target=1, methods=["hirescam"])
    assert close(found.entries[0].score, found[0].raw.sum(), TUTORIAL)
    assert (adapter.device.type, adapter.dtype) == ("cpu", torch.float32)
