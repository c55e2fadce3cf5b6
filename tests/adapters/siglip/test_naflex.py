"""SigLIP 2 NaFlex: images of different grids in one batch, padding, geometry, maps against slow oracles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Siglip2ImageProcessor, SiglipImageProcessor

from adapters.siglip.naflex import Siglip2Adapter
from adapters.siglip.pooling_head import ATTENTION, NORM, PATCH_MASK
from grounding import explain
from grounding.adapter.recorder import Recorder
from grounding.core.errors import LayerError, ModelError
from grounding.engine import signals
from grounding.engine.explain import compute_maps
from grounding.engine.plan import plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request
from tests.support import siglip
from tests.support.images import noise
from tests.support.oracles import pooling, vision
from tests.support.tolerances import ORACLE, SINGLE, close

CAPTION = "a man in a red jacket"
TEXTS = [CAPTION, "two dogs"]
IMAGES = [noise(90, 60), noise(40, 90, 3), noise(200, 30, 5), noise(64, 64, 7)]
METHODS = ["gradcam", "hirescam", "rollout", "relevance", "gradient_rollout", "attention"]


@pytest.fixture
def adapter():
    return siglip.naflex_adapter()


def test_the_batch_has_mixed_grids_and_padding(adapter):
    """What the tests below rely on."""
    inputs = adapter.prepare_images(IMAGES)
    grids = [(view.geometry.rows, view.geometry.columns) for view in inputs.views]
    assert len(set(grids)) == 4
    assert inputs.tensors["spatial_shapes"].tolist() == [list(grid) for grid in grids]
    assert inputs.tensors[PATCH_MASK].sum(1).tolist() == [rows * columns for rows, columns in grids]
    assert min(rows * columns for rows, columns in grids) < inputs.tensors[PATCH_MASK].shape[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_are_the_models_own(dtype):
    adapter = siglip.naflex_adapter(dtype=dtype)
    inputs = prepare(adapter, IMAGES, [TEXTS] * 4)
    targets = adapter.targets(inputs, [[text.caption()] for text in inputs.texts], "logits")
    ids = adapter.tokenizer(TEXTS, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = adapter.model(input_ids=ids, **inputs.images.tensors).logits_per_image
    assert close(signals.scores(adapter, inputs, targets).reshape(4, 2), expected, 1e-5)
    found = adapter.probabilities(inputs, adapter.encode_images(inputs.images), targets)
    assert close([p for p, _ in found], expected.sigmoid().flatten(), 1e-5)


def test_the_recorded_pooling_head_is_the_models_own(adapter):
    inputs = adapter.prepare_images(IMAGES)
    head = adapter.model.vision_model.head
    with torch.no_grad():
        expected = adapter.encode_images(inputs)
    with Recorder(adapter.model, {NORM: False}, {ATTENTION: False}) as recorder:
        found = adapter.encode_images(inputs)
    tokens = recorder.outputs[NORM]
    padded = ~inputs.tensors[PATCH_MASK].bool()
    with torch.no_grad():
        probe = head.probe.expand(len(tokens), -1, -1)
        weights = head.attention(probe, tokens, tokens, key_padding_mask=padded, average_attn_weights=False)[1]
    assert close(found, expected, 1e-5)
    assert close(recorder.weights[ATTENTION], weights, 1e-5)
    assert recorder.weights[ATTENTION][:, :, 0].movedim(1, -1)[padded].abs().max() == 0


def test_maps_equal_plain_loops_without_padding(adapter):
    """Each image of a batch of mixed grids against an oracle that has its real patches alone."""
    found = explain(adapter, IMAGES, [CAPTION] * 4, methods=METHODS[:5])
    tensors = adapter.prepare_images(IMAGES).tensors
    direction = siglip.text_embedding(adapter, CAPTION)
    for b, one in enumerate(found):
        own = pooling.run(pooling.PackedTower(adapter.model, tensors, b), direction)
        assert one.entries[0].score == pytest.approx(own.score, abs=1e-6)
        for name, expected in (
            ("gradcam", vision.gradcam(*own.normed)),
            ("hirescam", vision.hirescam(*own.normed)),
            ("rollout", pooling.rollout(own)),
            ("relevance", pooling.relevance(own)),
            ("gradient_rollout", pooling.gradient_rollout(own)),
        ):
            assert one.methods[name].maps.shape[1:] == tuple(tensors["spatial_shapes"][b].tolist())
            assert close(one.methods[name].maps[0].ravel(), expected)
        softened = pooling.run(pooling.PackedTower(adapter.model, tensors, b, detach=True), direction)
        for layer, pair in ((NORM, softened.normed), ("-1", softened.last)):
            rule = explain(adapter, IMAGES[b], CAPTION, methods=["gradcam_ln"], layers=[layer])
            assert close(rule.methods["gradcam_ln"].maps[0].ravel(), vision.gradcam(*pair))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_of_mixed_grids_equals_single_images(dtype):
    adapter = siglip.naflex_adapter(dtype=dtype)
    together = explain(adapter, IMAGES, [TEXTS] * 4, methods=METHODS)
    for image, own in zip(IMAGES, together, strict=True):
        for text, found in zip(TEXTS, own, strict=True):
            single = explain(adapter, image, text, methods=METHODS)
            assert close([e.score for e in found.entries], [e.score for e in single.entries], 1e-5)
            for name in METHODS:
                assert close(found.methods[name].maps, single.methods[name].maps, 1e-5)


def test_a_changed_padded_slot_changes_nothing(adapter):
    def computed(noisy):
        images = adapter.prepare_images(IMAGES)
        padded = ~images.tensors[PATCH_MASK].bool()
        assert padded.any()
        pixels = images.tensors["pixel_values"].clone()
        pixels[padded] += 5 * torch.randn_like(pixels[padded]) if noisy else 0
        images = replace(images, tensors={**images.tensors, "pixel_values": pixels})
        inputs = prepare(adapter, IMAGES, [[CAPTION]] * 4)
        inputs = replace(inputs, images=images)
        targets = adapter.targets(inputs, [[text.caption()] for text in inputs.texts], "similarity")
        return compute_maps(adapter, inputs, targets, plan_methods(adapter, Request(METHODS)))

    plain, changed = computed(noisy=False), computed(noisy=True)
    assert torch.equal(plain.scores, changed.scores)
    for name in METHODS:
        for one, other in zip(plain.maps[name], changed.maps[name], strict=True):
            assert np.array_equal(one, other)


def test_padded_slots_are_never_in_a_map(adapter):
    inputs = prepare(adapter, IMAGES, [[CAPTION]] * 4)
    mask = inputs.images.tensors[PATCH_MASK].bool()
    for path in (NORM, "vision_model.encoder.layers.0", "vision_model.embeddings"):
        places = adapter.patch_tokens(path, inputs, (*mask.shape, 32))
        for place, own in zip(places, mask, strict=True):
            assert sorted(place.index.ravel()) == own.nonzero()[:, 0].tolist()
    for shape in ((4, 1, 32), (4, 32), (4, 15, 32)):
        with pytest.raises(LayerError, match="does not have the 23 patch slots"):
            adapter.patch_tokens(NORM, inputs, shape)


@pytest.mark.parametrize("rule", [None, "layernorm"])
@pytest.mark.parametrize("kind", ["similarity", "logits", "norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_shortcut_equals_the_general_path(rule, kind, dtype):
    adapter = siglip.naflex_adapter(dtype=dtype)
    inputs = prepare(adapter, IMAGES, [TEXTS, ["red car"], [CAPTION], TEXTS])
    targets = adapter.targets(inputs, [[t.caption(), *t.tokens()] for t in inputs.texts], kind)
    shortcut = adapter.shortcut(kind)
    assert len(shortcut.layers) == 2
    for layer, others in shortcut.layers.items():
        with Recorder(adapter.model, dict.fromkeys([layer, *others], False)) as recorder:
            features = adapter.encode_images(inputs.images)
        with Recorder(adapter.model):
            found = shortcut.pooled_gradient(layer, inputs, targets, recorder.outputs, rule)
            again = shortcut.features(layer, recorder.outputs[layer], inputs.images)
        expected = signals.pooled_gradient(adapter, inputs, targets, layer, rule)
        assert close(found, expected, ORACLE if dtype == torch.float64 else SINGLE)
        if layer != NORM:
            assert close(again, features, ORACLE if dtype == torch.float64 else SINGLE)


SIZES = [(640, 480), (900, 200), (300, 500), (333, 777)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patches", [256, 60])
def test_cells_are_where_the_processor_puts_them(size, patches):
    """A ramp (red = x, green = y) through the real processor: the mean of each patch is at its predicted centre."""
    adapter = siglip.naflex_adapter(patch=16, patches=patches)
    adapter.image_processor = Siglip2ImageProcessor(
        patch_size=16, max_num_patches=patches, do_normalize=False, do_rescale=False
    )
    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.round(np.arange(width) * 255 / (width - 1))
    ramp[..., 1] = np.round(np.arange(height) * 255 / (height - 1))[:, None]
    inputs = adapter.prepare_images([Image.fromarray(ramp)])
    geometry = inputs.geometry(0)
    assert geometry.rows * geometry.columns <= patches
    assert geometry.seen_fraction == 1
    [place] = adapter.patch_tokens(NORM, prepare(adapter, [Image.fromarray(ramp)], [["red"]]), (1, patches, 32))
    means = inputs.tensors["pixel_values"][0].reshape(patches, -1, 3).mean(1).numpy()
    worst = 0.0
    for row in range(geometry.rows):
        for column in range(geometry.columns):
            red, green, _ = means[place.index[row, column]]
            x, y = geometry.cell_centre(row, column)
            measured = red / 255 * (width - 1) + 0.5, green / 255 * (height - 1) + 0.5
            cell = width / geometry.columns, height / geometry.rows
            worst = max(worst, abs(measured[0] - x) / cell[0], abs(measured[1] - y) / cell[1])
    assert worst < 0.05, worst


def test_a_processor_that_does_not_fit_is_refused():
    parts = siglip.naflex_adapter()
    with pytest.raises(ModelError, match=r"needs an image processor that resizes .* got SiglipImageProcessor"):
        Siglip2Adapter(parts.model, tokenizer=parts.tokenizer, image_processor=SiglipImageProcessor())
    other = Siglip2ImageProcessor(do_resize=False)
    with pytest.raises(ModelError, match="do_resize=True"):
        Siglip2Adapter(parts.model, tokenizer=parts.tokenizer, image_processor=other)
    adapter = Siglip2Adapter(parts.model, tokenizer=parts.tokenizer, image_processor=Siglip2ImageProcessor())
    with pytest.raises(ModelError, match=r"patches of 768 values, the model needs 192 .* set its patch_size to 8"):
        adapter.prepare_images([noise()])
    with pytest.raises(ModelError, match="needs a Siglip2Model"):
        Siglip2Adapter(siglip.siglip_model(), tokenizer=parts.tokenizer, image_processor=Siglip2ImageProcessor())
