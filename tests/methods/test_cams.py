"""Class activation maps against their definitions: of a convolution, of a ViT, and with several sequences or images."""

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.module.adapter import ModuleAdapter
from grounding import Selection, explain
from grounding.core.errors import OptionError
from tests.support import models, nets
from tests.support.contract import default_layer, structure
from tests.support.convolutional import CLASSES, COLUMNS, ROWS, ClassAdapter, Quadrants, one_by_one, quadrant
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.tolerances import ORACLE, TUTORIAL, close
from tests.support.tutorials import classifier, module
from tests.support.tutorials.clip import CAPTION, LAYERS, run_tutorial
from tests.support.tutorials.flava import FUSION, TEXT, entries, loop, patches
from tests.support.tutorials.trocr import TOKENS, tutorial

CAMS = list(vision.CAMS)
WHOLE = Selection(tokens=False)
IMAGES = [noise(70, 50, 1), noise(40, 90, 2), noise(64, 64, 3)]
ORTHOGONAL = LAYERS[1]  # read through a LayerNorm alone: in float32 <features, gradient> is rounding there
COLOURS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("layer", ["active", "features", "stem.0"])
def test_all_cams_of_a_convolutional_network(layer):
    """Three images in one batch, each with its own class; also behind a ReLU that works in place."""
    adapter = ClassAdapter(layer=layer)
    found = explain(adapter, IMAGES, ["3", "0", "1"], methods=CAMS, select=WHOLE)
    for image, number, one in zip(IMAGES, (3, 0, 1), found, strict=True):
        features, gradient = one_by_one(adapter, image, number, layer)
        for name in CAMS:
            assert one.methods[name].maps.shape == (1, ROWS, COLUMNS)
            assert close(one.map(0, name).raw.ravel(), vision.CAMS[name](features, gradient))


@pytest.mark.parametrize("kind", ["resnet", "convnext", "swin", "vit", "deit with teacher", "dinov2"])
@pytest.mark.parametrize("layer", [None, "0"])
def test_all_cams_of_image_classifiers(kind, layer):
    """Three images in one batch, each with its own class, at the default layer and at the first stage or block."""
    adapter = models.classifier_adapter(kind)
    path, prefix = structure(adapter).find_layer(adapter.model, layer), structure(adapter).prefix
    found = explain(adapter, IMAGES, classifier.ASKED, methods=CAMS, layers=[path])
    for image, index, one in zip(IMAGES, classifier.INDICES, found, strict=True):
        _, *kept, _ = classifier.tutorial(adapter, image, index, path)
        pair = [classifier.as_patches(tensor, prefix) for tensor in kept]
        for name in CAMS:
            assert close(one.map(0, name).raw.ravel(), vision.CAMS[name](*pair))


@pytest.mark.parametrize(
    ("net", "layer"),
    [(nets.Vgg, "features.28"), (nets.ResNet34, "layer3"), (nets.MobileNet, None), (nets.ViT, "encoder.layers.2.ln_1")],
)
def test_all_cams_of_any_module(net, layer):
    adapter = module.made(net(), layer, width=64, height=48 if net is nets.ViT else 96)
    found = explain(adapter, IMAGES, [3, 0, 4], methods=CAMS)
    for image, index, one in zip(IMAGES, (3, 0, 4), found, strict=True):
        kept = module.tutorial(adapter.model, adapter.preprocess(image), index, default_layer(adapter))
        pair = [classifier.as_patches(tensor, 2 if net is nets.ViT else 0) for tensor in kept]
        for name in CAMS:
            assert close(one.map(0, name).raw.ravel(), vision.CAMS[name](*pair))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ORACLE), (torch.float32, TUTORIAL)])
def test_all_cams_of_a_vit(layer, dtype, tolerance):
    adapter = models.clip_adapter(0, dtype)
    found = explain(adapter, IMAGES, [CAPTION] * 3, methods=CAMS, layers=[layer], select=Selection(phrases=["red"]))
    for image, one in zip(IMAGES, found, strict=True):
        runs = run_tutorial(adapter, image, layer)[:-1]  # the caption, then each token left out
        for i, (_, features, gradient, _) in enumerate(runs):
            for name in CAMS:
                if name == "hirescam" and layer == ORTHOGONAL and dtype == torch.float32:
                    continue
                assert close(one.map(i, name).raw.ravel(), vision.CAMS[name](features[1:], gradient[1:]), tolerance)


@pytest.mark.parametrize("layer", ["encoder.layers.1", "encoder.layernorm"])
def test_all_cams_of_an_encoder_decoder(trocr, layer):
    found = explain(trocr, noise(90, 30), TEXT, methods=CAMS, layers=[layer], select=TOKENS)
    for i, (_, features, gradient, _) in enumerate(tutorial(trocr, TEXT, layer)):
        for name in CAMS:
            assert close(found.map(i, name).raw.ravel(), vision.CAMS[name](features[1:], gradient[1:]))


@pytest.mark.parametrize("kind", ["matching", "logit"])
@pytest.mark.parametrize("layer", FUSION)
def test_all_cams_in_a_fusion_encoder(kind, layer):
    """Of a token left out, the caption and the caption without it: either with its own gradient."""
    adapter = models.flava_adapter()
    found = explain(adapter, noise(50, 40), TEXT, target=kind, methods=CAMS, layers=[layer], select=entries(kind))
    runs = loop(adapter, kind, FUSION[layer])
    for name in CAMS:
        cam = vision.CAMS[name]
        expected = [sum(cam(patches(f, 2), patches(g, 2)) for f, g in [run[1:3], *run[4]]) for run in runs]
        assert close(found.methods[name].maps.reshape(len(runs), -1), expected)


def test_grad_cam_pp_is_what_its_derivation_says():
    """Derivatives of exp(score), behind a ReLU and before a piecewise linear score: there eq. 10 is eq. 19."""
    adapter = ClassAdapter()
    found = explain(adapter, IMAGES[0], "2", methods=["gradcam_pp"], select=WHOLE)
    model = adapter.model
    with torch.no_grad():
        features = model.active(model.features(model.stem(adapter.pixels(IMAGES[0])[None])))[0].flatten(1)
    expected = vision.gradcam_pp_by_derivatives(features, lambda f: model.head(model.hidden(f[None]))[0, 2])
    assert close(found.map(0).raw.ravel(), expected)


def test_eps_of_grad_cam_pp(clip, image):
    """The published implementation's 1e-6 outweighs small gradients: its map is another one than the paper's."""
    [(_, features, gradient, _)] = run_tutorial(clip, image, LAYERS[0])[:1]
    expected = {eps: vision.gradcam_pp(features[1:], gradient[1:], eps) for eps in (0.0, 1e-6)}
    published = {"gradcam_pp.eps": 1e-6}
    for eps, options in ((0.0, {}), (1e-6, published)):
        found = explain(clip, image, CAPTION, methods=["gradcam_pp"], layers=[LAYERS[0]], select=WHOLE, options=options)
        assert close(found.map(0).raw.ravel(), expected[eps])
    apart = np.abs(expected[0.0] - expected[1e-6]).max()
    assert apart > 0.01 * np.abs(expected[0.0]).max()
    with pytest.raises(OptionError, match=r"gradcam_pp.eps: expected 0 or more, got -1"):
        explain(clip, image, CAPTION, methods=["gradcam_pp"], options={"gradcam_pp.eps": -1})


@pytest.mark.parametrize("name", CAMS)
@pytest.mark.parametrize("number", range(CLASSES))
@pytest.mark.parametrize("own", [True, False])
def test_a_class_that_reads_one_quadrant_has_its_map_there(name, number, own):
    """Each quadrant has a colour of its own, and so a channel: no other part of the image may have any of the map."""
    cells = np.zeros((ROWS, COLUMNS, 3), np.uint8)
    for place, colour in enumerate(COLOURS):
        cells[quadrant(place)] = 255 * np.array(colour)
    image = Image.fromarray(cells).resize((120, 60), Image.Resampling.NEAREST)
    known = ClassAdapter(Quadrants(COLOURS), "features")
    given = ModuleAdapter(known.model, "features", preprocess=known.pixels)
    asked = {"texts": str(number), "select": WHOLE} if own else {"target": number}
    found = explain(known if own else given, image, methods=[name], **asked)[0]
    inside = np.zeros((ROWS, COLUMNS), bool)
    inside[quadrant(number)] = True
    assert (found.view[inside] > 0).all()
    assert not found.view[~inside].any()
    x, y = found.peak
    assert (x > 60, y > 30) == (number % 2 == 1, number // 2 == 1)


@pytest.mark.parametrize("name", ["hirescam", "layercam"])
def test_of_a_channel_that_is_bright_everywhere_the_elementwise_maps_show_what_is_read(name):
    """Grad-CAM has one weight per channel: its map is the same in every cell of the image."""
    adapter = ClassAdapter(Quadrants([[1.0, 1.0, 1.0]]), "features")
    white = Image.new("RGB", (48, 32), "white")
    plain, found = explain(adapter, white, "1", methods=["gradcam", name], select=WHOLE).methods.values()
    assert np.ptp(plain.maps) <= ORACLE * np.abs(plain.maps).max()
    inside = np.zeros((ROWS, COLUMNS), bool)
    inside[quadrant(1)] = True
    assert np.array_equal(found.maps[0] > 0, inside)


@pytest.mark.parametrize("name", CAMS)
def test_smoothing_is_the_same_for_all_and_changes_what_is_stored(name, clip, image):
    import cv2

    plain, smooth = (
        explain(clip, image, CAPTION, methods=[name], select=WHOLE, options=options)[0].raw
        for options in ({}, {f"{name}.smooth": 0.8})
    )
    assert close(smooth, cv2.GaussianBlur(plain.astype(np.float64), (7, 7), 0.8, borderType=cv2.BORDER_REFLECT_101))


def test_where_features_and_gradient_are_orthogonal_an_elementwise_map_ranks_rounding(trocr):
    """The tutorials' layer of an encoder-decoder, which only a LayerNorm reads."""
    found = explain(trocr, noise(90, 30), TEXT, methods=CAMS, select=TOKENS)
    by_title = {
        title: w for w in found.warnings for title in ("Grad-CAM ", "HiResCAM", "LayerCAM", "Grad-CAM++") if title in w
    }
    assert "HiResCAM at encoder.layers.2 ranks rounding" in by_title["HiResCAM"]
    assert "weak evidence" not in by_title["HiResCAM"]
    assert all("is weak evidence" in by_title[title] for title in ("Grad-CAM ", "LayerCAM", "Grad-CAM++"))
    assert all("use gradcam_ln, the LN-rule, there" in text for text in by_title.values())
    sizes = {name: np.abs(found.methods[name].maps).max() for name in CAMS}
    assert sizes["hirescam"] < 1e-6 * sizes["layercam"]
    assert {s.status for s in found.methods["hirescam"].status} == {"degenerate"}
    assert all(s.reason.startswith("rounding") for s in found.methods["hirescam"].status)
    assert any(found.methods["layercam"].status)
    elsewhere = explain(trocr, noise(90, 30), TEXT, methods=CAMS, layers=["-1.in"], select=TOKENS)
    assert not any("<activation, gradient>" in w for w in elsewhere.warnings)


def test_no_cam_can_read_the_text_of_a_score_without_one():
    """`norm`: one map for all entries, from the first target of each image."""
    adapter = models.mean_adapter()
    found = explain(adapter, noise(50, 40), "two dogs", target="norm", methods=CAMS)
    assert all(call.shared and call.maps.any() for call in found.methods.values())
