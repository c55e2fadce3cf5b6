"""Every method against a slow oracle written from its definition, on random CLIPs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from grounding import METHODS, Selection, explain
from grounding.core.errors import LayerError, OptionError
from grounding.engine.passes import run_passes
from grounding.engine.plan import available, plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request
from grounding.engine.signals import attentions
from tests.support import models
from tests.support.contract import default_layer, grid, structure
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.tolerances import ORACLE, TUTORIAL, close
from tests.support.tutorials.clip import CAPTION, LAYERS, run_tutorial

SHIFTED = Selection(phrases=["red jacket"])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ORACLE), (torch.float32, TUTORIAL)])
def test_gradcam_equals_the_tutorial_loop(layer, seed, dtype, tolerance, image):
    adapter = models.clip_adapter(seed, dtype)
    found = explain(adapter, image, CAPTION, methods=["gradcam"], layers=[layer], select=SHIFTED)
    expected = run_tutorial(adapter, image, layer)
    assert close([entry.score for entry in found.entries], [score for score, *_ in expected], tolerance)
    for entry, (_, features, gradient, _) in zip(found, expected, strict=True):
        assert close(entry.raw.ravel(), vision.gradcam(features[1:], gradient[1:]), tolerance)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcam_ln_equals_a_loop_with_its_norms_written_out(clip, layer, image, monkeypatch):
    found = explain(clip, image, CAPTION, methods=["gradcam_ln"], layers=[layer], select=SHIFTED)
    plain = explain(clip, image, CAPTION, methods=["gradcam"], layers=[layer], select=SHIFTED)
    assert [e.score for e in found.entries] == [e.score for e in plain.entries]
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", vision.constant_deviation_norm)
    for i, (_, features, gradient, _) in enumerate(run_tutorial(clip, image, layer)):
        assert close(found.map(i).raw.ravel(), vision.gradcam(features[1:], gradient[1:]))
        assert np.abs(found.map(i).raw - plain.map(i).raw).max() > 1e-3 * np.abs(plain.map(i).raw).max()


def test_gradcam_options_equal_their_definitions(clip, image):
    plain, centred, smooth = (
        explain(clip, image, CAPTION, methods=["gradcam"], options=options)[0].raw
        for options in ({}, {"gradcam.token_centred": True}, {"gradcam.smooth": 0.8})
    )
    _, features, gradient, _ = run_tutorial(clip, image, LAYERS[0])[0]
    assert close(centred.ravel(), vision.gradcam(features[1:] - features[1:].mean(0), gradient[1:]))
    import cv2

    assert close(smooth, cv2.GaussianBlur(plain.astype(np.float64), (7, 7), 0.8, borderType=cv2.BORDER_REFLECT_101))


def test_threshold_is_a_view_and_replaces_the_zero_of_relu(clip, image):
    plain, cut = (
        explain(clip, image, CAPTION, methods=["gradcam"], options={"gradcam.threshold": t})[0] for t in (0, 0.5)
    )
    assert np.array_equal(plain.raw, cut.raw)
    assert plain.raw.min() < 0
    assert np.array_equal(plain.view, np.maximum(plain.raw, 0))
    assert np.array_equal(cut.view, np.where(plain.raw < 0.5 * plain.raw.max(), 0, plain.raw))


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_methods_equal_their_oracles(seed, image):
    adapter = models.clip_adapter(seed)
    names = ["rollout", "gradient_rollout", "relevance", "attention"]
    found = explain(adapter, image, CAPTION, methods=names, select=SHIFTED)
    for i, (_, _, _, pairs) in enumerate(run_tutorial(adapter, image, LAYERS[0])):
        weights = [attention for attention, _ in pairs]
        assert close(found.map(i, "rollout").raw.ravel(), vision.rollout(weights)[0, 1:])
        assert close(found.map(i, "gradient_rollout").raw.ravel(), vision.gradient_rollout(pairs)[0, 1:])
        assert close(found.map(i, "relevance").raw.ravel(), vision.relevance(pairs)[0, 1:])
        assert close(found.map(i, "attention").raw.ravel(), weights[-1].mean(0)[0, 1:])


@pytest.mark.parametrize(("fusion", "reduce"), [("mean", np.mean), ("max", np.max), ("min", np.min)])
@pytest.mark.parametrize("discard", [0.0, 0.3])
def test_rollout_options(clip, image, fusion, reduce, discard):
    options = {"rollout.fusion": fusion, "rollout.discard": discard}
    found = explain(clip, image, CAPTION, methods=["rollout"], options=options)[0]
    pairs = run_tutorial(clip, image, LAYERS[0])[0][3]
    joint = vision.rollout([attention for attention, _ in pairs], reduce, discard)
    assert close(found.raw.ravel(), joint[0, 1:])
    assert joint.sum(1) == pytest.approx(1)


def test_rollout_rows_sum_to_one(clip, image):
    """The map and the part that stays on the CLS token make one."""
    inputs = prepare(clip, [image], [[CAPTION]])
    weights = [w[0].numpy() for w in attentions(clip, inputs)]
    for fusion in ("mean", "max", "min"):
        found = explain(clip, image, CAPTION, methods=["rollout"], options={"rollout.fusion": fusion})[0].raw
        on_cls = vision.rollout(weights, getattr(np, fusion))[0, 0]
        assert found.sum() + on_cls == pytest.approx(1, abs=1e-6)


def test_one_layer_relevance_is_attention_gradcam(clip, image):
    found = explain(clip, image, CAPTION, methods=["relevance"], options={"relevance.start_layer": -1})
    for i, (_, _, _, pairs) in enumerate(run_tutorial(clip, image, LAYERS[0])[: len(found.entries)]):
        assert close(found.map(i).raw.ravel(), vision.attention_gradcam(*pairs[-1])[0, 1:])


def test_raw_attention_of_one_head(clip, image):
    options = {"attention.layer": 0, "attention.head": 2}
    found = explain(clip, image, CAPTION, methods=["attention"], options=options)[0].raw
    assert close(found.ravel(), run_tutorial(clip, image, LAYERS[0])[0][3][0][0][2, 0, 1:])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rollout.fusion": "sum"}, OptionError, "'sum' is none of mean, max, min"),
        ({"rollout.discard": "1.5"}, OptionError, r"rollout.discard: expected a fraction in \[0, 1\), got 1.5"),
        ({"gradcam.threshold": 5}, OptionError, r"gradcam.threshold: expected a fraction in \[0, 1\)"),
        ({"gradcam.threshold": -0.5}, OptionError, r"gradcam.threshold"),
        ({"rollout.discart": "0.5"}, OptionError, "did you mean 'discard'"),
        ({"relevance.start_layer": "one"}, OptionError, "expected int"),
        ({"relevance.start_layer": 7}, LayerError, "not in -3 to 2"),
        ({"gradcam.smooth": -1}, OptionError, "0 or more"),
        ({"gradcam.token_centred": "perhaps"}, OptionError, "true or false"),
        ({"gradcam": 1}, OptionError, "method.option=value"),
        ({"attention.head": 1}, OptionError, "is not requested"),
        ({"gradkam.smooth": 1}, ValueError, "no method 'gradkam'"),
    ],
)
def test_wrong_options_are_refused(clip, image, options, error, words):
    with pytest.raises(error, match=words):
        explain(clip, image, CAPTION, options=options)


def test_unknown_method_names_the_nearest(clip, image):
    with pytest.raises(ValueError, match="did you mean 'rollout'"):
        explain(clip, image, CAPTION, methods=["rolout"])


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_runs_on_every_architecture(any_adapter, name):
    """Finite maps of the grid's shape for a batch of images with ragged texts, equal to one by one; where the
    architecture has not the attention for it, an error that says so."""
    if name not in available(structure(any_adapter)):
        with pytest.raises(OptionError, match=f"'{name}' reads .* attention, which .* does not have"):
            explain(any_adapter, noise(70, 50, 1), CAPTION, methods=[name])
        return
    images = [noise(70, 50, 1), noise(40, 90, 2)]
    texts = [["two dogs", "a red bus"], ["man in red jacket on a horse"]]
    together = explain(any_adapter, images, texts, methods=[name])
    # Rounding differs from run to run: compare at a layer where <features, gradient> is larger than that.
    layers = ["-1.in"] if any("ranks rounding" in w for w in together[0][0].warnings) else []
    together = explain(any_adapter, images, texts, methods=[name], layers=layers) if layers else together
    assert [len(found) for found in together] == [2, 1]
    for b, explanations in enumerate(together):
        for explanation, text in zip(explanations, texts[b], strict=True):
            alone = explain(any_adapter, images[b], text, methods=[name], layers=layers)
            found = explanation.methods[name]
            assert found.maps.shape[1:] == grid(prepare(any_adapter, [images[b]], [[text]]))
            assert close(found.maps, alone.methods[name].maps)
            assert [e.score for e in explanation.entries] == pytest.approx([e.score for e in alone.entries], abs=1e-9)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_reads_only_what_it_declares(clip, trocr, image, name):
    method = METHODS[name]
    clip = next(a for a in (clip, trocr, models.flava_adapter(kind="logit")) if name in available(structure(a)))
    inputs = prepare(clip, [image], [[CAPTION]])
    targets = clip.targets(inputs, [[inputs.texts[0].caption()]], clip.target_kinds[0])
    for signal in method.needs:
        [chunk] = list(run_passes(clip, inputs, targets, plan_methods(clip, Request([name]))))
        less = replace(method, needs=method.needs - {signal})
        path = default_layer(clip) if method.reads_layer else None
        with pytest.raises(RuntimeError, match=f"reads '{signal}'"):
            less(chunk.trace.at(path, less.needs))


def test_several_layers_give_maps_each_or_joint_ones(clip, image):
    layers = ["-1.in", "-2"]
    apart = explain(clip, image, CAPTION, methods=["gradcam", "rollout"], layers=layers)
    assert list(apart.methods) == ["gradcam@-1.in", "gradcam@-2", "rollout"]
    assert apart.methods["gradcam@-2"].layer == "vision_model.encoder.layers.1"
    joint = explain(clip, image, CAPTION, methods=["gradcam"], layers=layers, average_layers=True)
    assert list(joint.methods) == ["gradcam@-1.in+-2"]
    scaled = [apart.map(1, f"gradcam@{layer}").raw for layer in layers]
    assert close(joint.map(1).raw, np.mean([m / np.abs(m).max() for m in scaled], 0))
