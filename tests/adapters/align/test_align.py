"""ALIGN: scores against the model's own forward, maps against plain loops, grids and geometry, commands."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EfficientNetImageProcessor

from adapters.align.adapter import AlignAdapter
from grounding import Selection, explain
from grounding.adapter.recorder import Recorder
from grounding.core.errors import LayerError, OptionError
from grounding.engine.layers import list_layers
from grounding.engine.plan import available
from grounding.engine.queries import prepare
from grounding.engine.signals import attentions, pooled_gradient
from tests.support import align, checkpoints, models
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.tolerances import ORACLE, TUTORIAL, close

TEXT = "a man in a red jacket"
LAST = "vision_model.encoder.blocks.3"
LAYERS = [LAST, "vision_model.encoder.blocks.2", f"{LAST}.expansion"]
KINDS = ("similarity", "logits", "norm")


@pytest.fixture
def adapter():
    return models.align_adapter()


def pixels(adapter, image):
    return adapter.image_processor(image, return_tensors="pt")["pixel_values"].to(adapter.dtype)


def own_score(adapter, kind, image, text, hidden=()):
    """The score of the model's own forward pass, the tokens at positions `hidden` masked."""
    encoded = adapter.tokenizer(text, return_tensors="pt")
    mask = encoded["attention_mask"].clone()
    mask[0, list(hidden)] = 0
    out = adapter.model(encoded["input_ids"], pixels(adapter, image), attention_mask=mask)
    if kind == "norm":
        return out.vision_model_output.pooler_output.norm()
    return out.logits_per_image[0, 0] * (adapter.model.temperature if kind == "similarity" else 1)


def loop(adapter, kind, layer, image, text=TEXT):
    """Score, features and gradient (P, D) of the caption, then of each token left out."""
    count = len(adapter.tokenizer(text)["input_ids"]) - 2
    runs = []
    for place in (None, *range(1, count + 1)) if kind != "norm" else (None,):
        kept = []

        def hook(_module, _args, output, kept=kept):
            output.retain_grad()
            kept.append(output)

        handle = adapter.model.get_submodule(layer).register_forward_hook(hook)
        score = own_score(adapter, kind, image, text)
        if place is not None:
            score = score - own_score(adapter, kind, image, text, [place])
        handle.remove()
        score.backward()
        gradient = sum(one.grad for one in kept)
        runs.append((score.item(), *(one[0].flatten(1).T.detach().numpy() for one in (kept[0], gradient))))
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_models_own_forward(adapter, kind):
    images, texts = [noise(50, 40), noise(30, 90, 2)], [[TEXT, "two dogs"], ["red car and red bus"]]
    found = explain(adapter, images, texts, target=kind, methods=["gradcam"], select=Selection(tokens=False))
    for image, own, explanations in zip(images, texts, found, strict=True):
        for text, one in zip(own, explanations, strict=True):
            assert close(one.entries[0].score, own_score(adapter, kind, image, text).detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ORACLE), (torch.float32, TUTORIAL)])
def test_maps_equal_a_plain_loop(kind, method, dtype, tolerance):
    adapter, image = models.align_adapter(dtype=dtype), noise(50, 40)
    found = explain(adapter, image, TEXT, target=kind, methods=[method], layers=LAYERS)
    for layer in LAYERS:
        runs = loop(adapter, kind, layer, image)
        expected = [vision.CAMS[method](features, gradient) for _, features, gradient in runs]
        assert close(found.methods[f"{method}@{layer}"].maps.reshape(len(runs), -1), expected, tolerance)
        assert close([entry.score for entry in found.entries], [run[0] for run in runs], tolerance)


def test_a_map_of_the_cosine_sums_to_zero(adapter):
    """At the pooled map every cell has the same gradient, which is orthogonal to their mean, the embedding."""
    maps = explain(adapter, noise(50, 40), TEXT, methods=["gradcam"]).methods["gradcam"].maps
    assert np.abs(maps.sum((1, 2))).max() < 1e-5 * np.abs(maps).sum((1, 2)).min()
    assert (maps.max((1, 2)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_the_shortcut_equals_the_general_path(kind, pooling):
    adapter = models.align_adapter(pooling_type=pooling)
    texts = [[None], [None]] if kind == "norm" else [[TEXT, "two dogs"], ["red car"]]
    inputs = prepare(adapter, [noise(50, 40), noise(30, 70, 2)], texts, kind)
    targets = adapter.targets(inputs, [[text.caption(), *text.tokens()] for text in inputs.texts], kind)
    shortcut = adapter.shortcut(kind)
    assert list(shortcut.layers) == [LAST]
    with Recorder(adapter.model, {LAST: False}) as recorder:
        adapter.forward(inputs, targets)
    found = shortcut.pooled_gradient(LAST, inputs, targets, recorder.outputs, None)
    assert close(found, pooled_gradient(adapter, inputs, targets, LAST))
    features = shortcut.features(LAST, recorder.outputs[LAST])
    assert torch.equal(features, adapter.encode_images(inputs.images))


def test_a_modified_pooling_has_no_shortcut(adapter):
    adapter.model.vision_model.pooler.register_forward_hook(lambda _m, _a, out: out.square())
    assert adapter.shortcut("similarity") is None
    found = explain(adapter, noise(50, 40), TEXT, methods=["gradcam"])
    expected = [vision.gradcam(f, g) for _, f, g in loop(adapter, "similarity", LAST, noise(50, 40))]
    assert close(found.methods["gradcam"].maps.reshape(len(expected), -1), expected)


def test_alone_is_a_text_of_its_own(adapter):
    found = explain(adapter, noise(50, 40), TEXT, methods=["gradcam"], token_target="alone")
    own = explain(adapter, noise(50, 40), "red", methods=["gradcam"])
    assert found.entries[5].label == "red"
    assert close(found.entries[5].score, own.entries[0].score)
    assert close(found.methods["gradcam"].maps[5], own.methods["gradcam"].maps[0])


def test_a_batch_equals_single_images_and_texts(adapter):
    images, texts = [noise(50, 40, 1), noise(30, 70, 2)], [[TEXT, "two dogs"], ["red car"]]
    methods = ["gradcam", "hirescam"]
    together = explain(adapter, images, texts, methods=methods)
    for image, own, explanations in zip(images, texts, together, strict=True):
        for text, found in zip(own, explanations, strict=True):
            alone = explain(adapter, image, text, methods=methods)
            for name in methods:
                assert close(found.methods[name].maps, alone.methods[name].maps)


def test_a_long_text_is_cut_and_said(adapter):
    found = explain(adapter, noise(50, 40), "man " * 40, methods=["gradcam"])
    assert any("longer than the model's 24 tokens; cut off:" in warning for warning in found.warnings)


def test_methods_that_read_attention_are_refused_with_the_reason(adapter):
    assert available(adapter.structure("similarity")) == ("gradcam", "gradcam_ln", "hirescam", "layercam", "gradcam_pp")
    for method in ("rollout", "relevance", "grad_x_attention"):
        with pytest.raises(OptionError, match="align does not have: its image encoder is convolutional"):
            explain(adapter, noise(50, 40), TEXT, methods=[method])
    with pytest.raises(Exception, match="no attention of align can be recorded: its image encoder is convolutional"):
        attentions(adapter, prepare(adapter, [noise(50, 40)], [[TEXT]]))
    assert list(explain(adapter, noise(50, 40), TEXT).methods) == ["gradcam"]


def test_layers_with_a_grid(adapter):
    """Maps of every stage are layers; padded maps and the one cell of a squeeze are none."""
    layers = {layer.path: layer for layer in list_layers(adapter, noise(50, 40), TEXT)}
    assert layers[LAST].default
    assert layers[LAST].alias == "3"
    assert all(layer.live for layer in layers.values())
    assert {layer.shape[2:] for layer in layers.values()} == {(32, 48), (16, 24), (8, 12), (4, 6)}
    assert f"{LAST}.squeeze_excite" in layers
    for path, why in (("squeeze_excite.reduce", "one cell"), ("depthwise_conv.depthwise_conv_pad", "a padded")):
        with pytest.raises(LayerError, match=why):
            explain(adapter, noise(50, 40), TEXT, methods=["gradcam"], layers=[f"{LAST}.{path}"])


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (75, 63), (255, 129), (33, 100)])
@pytest.mark.parametrize("padded", [[], [1, 3]])
def test_the_grid_is_that_of_the_last_feature_map(size, padded):
    adapter = models.align_adapter(size=size, depthwise_padding=padded)
    inputs = adapter.prepare_images([noise(50, 40)])
    with torch.no_grad():
        found = adapter.model.vision_model(inputs.tensors["pixel_values"]).last_hidden_state
    geometry = inputs.geometry(0)
    assert (geometry.rows, geometry.columns) == tuple(found.shape[2:])


def test_an_image_too_small_for_a_grid_is_refused():
    with pytest.raises(LayerError, match=r"an input of 20 x 20 pixels leaves a feature map of 1 x 1"):
        models.align_adapter(size=(20, 20)).prepare_images([noise(50, 40)])


CROP = {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "size": {"height": 80, "width": 80}}


@pytest.mark.parametrize("settings", [{}, CROP], ids=["squash", "squash and crop"])
@pytest.mark.parametrize(("width", "height"), [(900, 200), (300, 400), (64, 64), (531, 307)])
def test_cells_lie_where_the_processor_puts_them(adapter, settings, width, height):
    """Grey ramps through the real processor: its mean over a cell is the original position of the cell's centre."""
    adapter.image_processor = EfficientNetImageProcessor(**{"size": {"height": 64, "width": 96}} | settings)
    geometry = adapter.prepare_images([noise(width, height)]).geometry(0)
    for axis, length in enumerate((width, height)):
        levels = 255 * (np.arange(length) + 0.5) / length
        ramp = np.broadcast_to(levels if axis == 0 else levels[:, None], (height, width)).round().astype(np.uint8)
        plain = {"do_rescale": False, "do_normalize": False, "include_top": False}
        seen = adapter.image_processor(Image.fromarray(ramp).convert("RGB"), return_tensors="np", **plain)
        cells = seen["pixel_values"][0, 0].astype(float)
        down, across = cells.shape[0] // geometry.rows, cells.shape[1] // geometry.columns
        cells = cells.reshape(geometry.rows, down, geometry.columns, across).mean((1, 3)) * length / 255
        size = geometry.cell_size[axis] / geometry.scale[axis]
        for row in range(geometry.rows):
            for column in range(geometry.columns):
                expected = geometry.cell_centre(row, column)[axis]
                assert abs(cells[row, column] - expected) < 0.05 * size, (row, column)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.save(models.align_adapter(), tmp_path_factory.mktemp("tiny-align"))


def test_a_checkpoint_loads_and_the_commands_run(checkpoint, tmp_path, capsys):
    assert checkpoints.loads_by_name(checkpoint, AlignAdapter).info.type == "align"
    out, _ = checkpoints.commands_run(checkpoint, tmp_path, capsys, LAST)
    assert "gradcam" in out


@pytest.mark.slow
def test_a_batch_run_survives_a_kill(checkpoint, tmp_path):
    checkpoints.survives_a_kill(checkpoint, tmp_path)


def test_the_size_of_the_usual_encoder():
    """EfficientNet-B7 of the published model, without its weights: 289 pixels become 9 x 9 cells."""
    with torch.device("meta"):
        model = align.AlignModel(align.AlignConfig())
    adapter = models.align_adapter()
    adapter.model = model
    assert adapter._grid_of(289, 289) == (9, 9)
