"""Modules of a user that behave like no known model, and the errors for those that cannot be used."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adapters.module.adapter import ModuleAdapter
from grounding import explain
from grounding.adapter.class_names import ClassNames
from grounding.core.errors import LayerError, ModelError, ProbeError, TargetError
from grounding.core.images import open_image
from grounding.engine.warnings import map_warnings
from grounding.explanation.maps import Status
from tests.support import models, nets
from tests.support.contract import default_layer
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.tolerances import close
from tests.support.tutorials.module import made, tutorial

IMAGES = [noise(90, 60, 1), noise(40, 70, 2), noise(64, 64, 3)]


class ClassBehind(nets.ViT):
    """A ViT with its two extra tokens behind the patches, or one before and one behind."""

    def __init__(self, before=0):
        super().__init__()
        self.before = before

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = self.tokens.expand(len(x), -1, -1)
        x = torch.cat([tokens[:, : self.before], x, tokens[:, self.before :]], 1)
        return self.heads(self.encoder.ln(self.encoder.layers(x))[:, -1])


@pytest.mark.parametrize("before", [0, 1])
def test_tokens_behind_the_patches(before):
    adapter = made(ClassBehind(before), prefix=before, width=48, height=32)
    path = "encoder.layers.2.ln_1"
    assert default_layer(adapter) == path
    found = explain(adapter, IMAGES, [3, 0, 4], methods=["gradcam"])
    for image, index, explanation in zip(IMAGES, (3, 0, 4), found, strict=True):
        pair = [
            t[before : -2 + before].numpy() for t in tutorial(adapter.model, adapter.preprocess(image), index, path)
        ]
        assert close(explanation[0].raw.ravel(), vision.gradcam(*pair))
        assert not [line for line in explanation.warnings if "prefix=" in line]


def test_tokens_assumed_before_the_patches_are_a_warning():
    [line] = [line for line in explain(made(nets.ViT()), IMAGES[0]).warnings if "prefix=" in line]
    assert line == (
        "2 tokens more than the cells of layer 'conv_proj': assumed to be before the patches; give prefix= if not"
    )
    given = explain(made(nets.ViT(), prefix=2), IMAGES[0])
    assert not [line for line in given.warnings if "prefix=" in line]
    assert np.array_equal(given[0].raw, explain(made(nets.ViT()), IMAGES[0])[0].raw)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (-1, "0 or more, got -1"),
        (3, r"prefix=3, but no layer of ViT has 3 or more tokens beside the 8 x 8 cells of layer 'conv_proj'"),
    ],
)
def test_a_prefix_that_cannot_be(prefix, words):
    with pytest.raises(ModelError, match=words):
        made(nets.ViT(), prefix=prefix)


def test_labels_as_they_come_from_json():
    assert made(nets.MobileNet(), labels={str(i): name for i, name in enumerate("abcde")}).class_names.names == tuple(
        "abcde"
    )
    with pytest.raises(ModelError, match="labels='abcde' is a string, not a list of class names"):
        made(nets.MobileNet(), labels="abcde")
    with pytest.raises(ModelError, match="labels name 6 classes, the model returns 5 scores"):
        made(nets.MobileNet(), labels={"0": "a", 0: "b", 1: "c", 2: "d", 3: "e", 4: "f"})


@pytest.mark.parametrize("squeeze", [lambda y: y[:, :1].squeeze(1), lambda y: y[:, :1].squeeze()])
def test_one_score_that_was_squeezed(squeeze):
    plain = explain(made(nets.Answers(lambda y: y[:, :1])), IMAGES)
    for one, other in zip(explain(made(nets.Answers(squeeze)), IMAGES), plain, strict=True):
        assert close(one[0].raw, other[0].raw)
        assert one.entries == other.entries
    explain(made(nets.Answers(squeeze)), IMAGES[0])


def test_a_dict_without_logits_names_its_keys():
    with pytest.raises(
        ModelError,
        match=r"a dict with the keys 'out', 'aux', expected scores of shape \(images, classes\) as 'logits'",
    ):
        made(nets.Answers(lambda y: {"out": y, "aux": y}))
    with pytest.raises(ModelError, match="a dict with the keys none, expected"):
        made(nets.Answers(lambda y: {}))


@pytest.mark.parametrize("preprocess", [None, 7])
def test_a_preprocess_that_cannot_be_called(preprocess):
    with pytest.raises(ModelError, match=f"preprocess must be a callable .*, got {preprocess}$"):
        ModuleAdapter(nets.MobileNet(), preprocess=preprocess)


def test_inputs_of_different_sizes_name_what_gives_them():
    def plain(image):
        return torch.from_numpy(np.asarray(image).astype(np.float64).transpose(2, 0, 1) / 255)

    with pytest.raises(
        ModelError, match=r"^preprocess returns inputs of different sizes \(96x64, 64x96\): use batch_size=1"
    ):
        explain(made(nets.MobileNet(), preprocess=plain), [noise(64, 96), noise(96, 64)], target=1)


@pytest.mark.parametrize("asked", [-1, "-1"])
def test_a_negative_index_raises_with_the_range(asked):
    with pytest.raises(TargetError, match=r"^ours has no class -1: its 2 classes are 0 to 1$"):
        ClassNames(("dog", "cat"), "ours").find(asked)
    with pytest.raises(TargetError, match=r"^ours has no class -1: its only class is 0$"):
        ClassNames(("dog",), "ours").find(asked)


def test_a_name_that_is_a_number_goes_first():
    assert ClassNames(("dog", "-1"), "ours").find("-1") == 1


def test_an_unknown_kind_of_target_raises_with_the_known_ones():
    adapter = made(nets.MobileNet())
    with pytest.raises(TargetError, match=r"no class 'logit' \(it has 5: .*\); this model's kind of target is class$"):
        explain(adapter, IMAGES[0], target="logit")
    with pytest.raises(TargetError, match=r"no class 'logit' \(it has 5: .*\)$"):
        explain(adapter, IMAGES[0], target=["logit"])


@pytest.mark.parametrize("layer", ["encoder.layers.2", "encoder.ln"])
def test_a_dead_tap_of_the_users_names_a_live_one(layer):
    adapter = made(nets.ViT(), layer, prefix=2)
    assert default_layer(adapter) == layer
    with pytest.raises(
        LayerError, match=f"layer '{layer}' is dead: .*; use 'encoder.layers.2.ln_1', or see --list-layers"
    ):
        explain(adapter, IMAGES[0])


# ---------------------------------------------------------------- what prepares the images


class Five(nn.Module):
    """Takes images of five channels; a convolution that is made first takes one."""

    def __init__(self):
        super().__init__()
        self.unused, self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(5, 4, 4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def five(image):
    values = models.to_pixels(64, 64)(image)
    return torch.cat([values, values[:2]])


def test_any_number_of_channels_and_convolutions_that_take_others():
    found = explain(ModuleAdapter(Five().double(), preprocess=five), noise(90, 60, 1), target=0)
    assert found.methods["gradcam"].maps.shape == (1, 16, 16)
    assert found.geometry.scale == pytest.approx((64 / 90, 64 / 60), rel=0.01)


class Fixed(nn.Module):
    """Takes images of one size."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 4, 4), nn.Linear(4 * 8 * 8, 3)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


@pytest.mark.parametrize(
    ("model", "preprocess", "words"),
    [
        (Five(), models.to_pixels(32, 32), "returns 3 channels, the first convolution of Five takes 1; mode='L' gives"),
        (
            Fixed(),
            lambda image: torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1),
            r"Fixed fails on a blank image of 256 x 256, \(1, 3, 256, 256\) after preprocess: RuntimeError: mat1 and",
        ),
        (Fixed(), lambda _: None, "preprocess returns a NoneType, expected pixel values"),
        (Fixed(), lambda image: {"image": image}, r"returns a dict with the keys \['image'\], expected pixel values"),
        (Fixed(), lambda image: (torch.zeros(3, 32, 32), {}), "preprocess returns a tuple, expected pixel values"),
    ],
)
def test_what_cannot_be_used_says_why(model, preprocess, words):
    with pytest.raises(ModelError, match=words):
        ModuleAdapter(model, preprocess=preprocess)


class NoGrad(Fixed):
    """As models are written that are only ever used."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Detached(Fixed):
    """A head that is trained by itself."""

    def forward(self, x):
        return self.head(self.conv(x).detach().flatten(1))


@pytest.mark.parametrize("net", [NoGrad, Detached])
def test_models_that_no_gradient_passes_say_so(net):
    with pytest.raises(
        ModelError, match=f"no gradient passes {net.__name__}: its forward runs under torch.no_grad, or"
    ):
        ModuleAdapter(net(), preprocess=models.to_pixels(32, 32))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_traced_module_cannot_be_watched():
    with pytest.raises(ModelError, match="give the module it was made from"):
        ModuleAdapter(torch.jit.trace(Fixed(), torch.zeros(1, 3, 32, 32)), preprocess=models.to_pixels(32, 32))


def is_spatial(image):
    """Changes the very image that it is given."""
    image.thumbnail((32, 32))
    return torch.from_numpy(np.array(image.resize((32, 32)), np.float64) / 255).permute(2, 0, 1)


def test_the_image_is_not_the_preprocessings_to_change(tmp_path):
    image = open_image(noise(90, 60, 1))
    found = explain(ModuleAdapter(Fixed().double(), preprocess=is_spatial), image, target=0)
    assert (image.pil.size, found.image.pil.size) == ((90, 60), (90, 60))
    found.save(tmp_path / "out")


def standardised(image):
    values = models.to_pixels(32, 32)(image)
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize("moves", [models.to_pixels(32, 32), lambda image: image.resize((32, 32))])
def test_normalisation_by_image_needs_a_geometry(moves):
    model, image = Fixed().double(), noise(90, 60, 1)
    with pytest.raises(ProbeError, match="normalised per image; give its geometric steps alone as geometry="):
        explain(ModuleAdapter(model, preprocess=standardised), image, target=0)
    found = explain(ModuleAdapter(model, preprocess=standardised, geometry=moves), image, target=0)
    plain = explain(ModuleAdapter(model, preprocess=models.to_pixels(32, 32)), image, target=0)
    assert found.geometry == plain.geometry
    assert not np.array_equal(found[0].raw, plain[0].raw)


# ---------------------------------------------------------------- what is asked for


def test_a_tap_may_be_the_module_itself():
    model = nets.Vgg()
    adapter = ModuleAdapter(model, model.features[16], preprocess=models.to_pixels(64, 64))
    assert default_layer(adapter) == "features.16"
    with pytest.raises(LayerError, match="the Conv2d given as layer is no module inside Vgg"):
        ModuleAdapter(model, nn.Conv2d(3, 3, 1), preprocess=models.to_pixels(64, 64))
    with pytest.raises(ModelError, match="0 or more, got True"):
        ModuleAdapter(model, preprocess=models.to_pixels(64, 64), prefix=True)


def test_a_class_with_the_name_of_the_kind_of_target():
    adapter = made(nets.Vgg(), labels=["a", "b", "class", "d", "e"])
    with pytest.raises(
        TargetError, match=r"'class' is this model's kind of target and the name of a class: ask .* as \["
    ):
        explain(adapter, IMAGES[0], target="class")
    assert explain(adapter, IMAGES[0], target=["class"])[0].entry.token_id == 2
    assert len(explain(adapter, IMAGES[0])) == 1


def test_warnings_of_several_layers_name_theirs():
    found = explain(made(nets.Vgg()), IMAGES[0], target=1, layers=["features.9", "features.28"], methods="gradcam")
    blank = {key: replace(one, status=(Status("degenerate", "flat"),)) for key, one in found.methods.items()}
    assert list(map_warnings(blank, found.entries)) == [
        f"Grad-CAM at {layer} of 'class 1' is no evidence: flat" for layer in ("features.9", "features.28")
    ]
    alone = dict(list(blank.items())[:1])
    assert list(map_warnings(alone, found.entries)) == ["Grad-CAM of 'class 1' is no evidence: flat"]
