"""BLIP: every target against the model's own forward and plain loops, texts, recorded attention, commands."""

import numpy as np
import pytest
import torch

from adapters.blip.adapter import KEYS, BlipAdapter
from grounding import Selection, explain
from grounding.adapter.recorder import Recorder
from grounding.core.errors import LayerError, TargetError
from grounding.engine.layers import list_layers
from grounding.engine.queries import prepare
from grounding.engine.signals import attentions, pooled_gradient
from tests.support import checkpoints, models
from tests.support.images import noise
from tests.support.oracles import matching, vision
from tests.support.tolerances import ORACLE, TUTORIAL, close

TEXT = "a man in a red jacket"
KINDS = ("matching", "similarity")
PATCHES = 16
BLOCK = "vision_model.encoder.layers"


@pytest.fixture
def blip():
    return models.blip_adapter()


def pixels(adapter, image):
    return adapter.image_processor(image, return_tensors="pt")["pixel_values"].to(adapter.dtype)


def loop(adapter, kind, layer, text=TEXT, image=None):
    """The caption, then each token left out."""
    ids = adapter.tokenizer(text)["input_ids"]
    tutorial = matching.Tutorial(adapter.model, pixels(adapter, image or noise(50, 40)), ids)
    return [tutorial.run(kind, layer, place) for place in (None, *range(1, len(ids) - 1))]


def patches(features):
    """(P, D) of a sequence (1 + P, D), or of a convolution's (D, rows, columns)."""
    return features.reshape(len(features), -1).T if features.ndim == 3 else features[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_models_own_forward(blip, kind):
    images, texts = [noise(50, 40), noise(30, 90, 2)], [[TEXT, "two dogs"], ["red car and red bus"]]
    found = explain(blip, images, texts, target=kind, methods=["gradcam"], select=Selection(tokens=False))
    for image, own, explanations in zip(images, texts, found, strict=True):
        for text, one in zip(own, explanations, strict=True):
            encoded = blip.tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                expected = blip.model(
                    encoded["input_ids"],
                    pixels(blip, image),
                    use_itm_head=kind == "matching",
                    attention_mask=encoded["attention_mask"],
                ).itm_score[0]
            expected = expected[1] - expected[0] if kind == "matching" else expected[0]
            assert close(one.entries[0].score, expected)


def test_a_single_text_has_exactly_the_models_score(blip):
    inputs = prepare(blip, [noise(50, 40)], [[TEXT]], "matching")
    targets = blip.targets(inputs, [[inputs.texts[0].caption()]], "matching")
    with torch.no_grad():
        found = blip.forward(inputs, targets)
        logits = blip.model(**inputs.images.tensors, **inputs.tensors).itm_score
    assert torch.equal(found, logits[:, 1] - logits[:, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ORACLE), (torch.float32, TUTORIAL)])
def test_gradcam_equals_a_plain_loop(kind, dtype, tolerance):
    adapter = models.blip_adapter(dtype=dtype)
    layers = ["vision_model.embeddings.patch_embedding", f"{BLOCK}.0", f"{BLOCK}.2.layer_norm1"]
    layers += [KEYS, f"{BLOCK}.2"] if kind == "matching" else []
    found = explain(adapter, noise(50, 40), TEXT, target=kind, methods=["gradcam"], layers=layers)
    for layer in layers:
        runs = loop(adapter, kind, layer)
        expected = [vision.gradcam(patches(features), patches(gradient)) for _, features, gradient, _ in runs]
        assert close(found.methods[f"gradcam@{layer}"].maps.reshape(len(runs), -1), expected, tolerance)
        assert close([entry.score for entry in found.entries], [run[0] for run in runs], tolerance)


def start(index, length):
    """Where chains of attention start: the token's own place, of a caption the mean over its tokens'."""
    row = np.zeros(length)
    row[np.arange(1, length - 1) if index == 0 else [index]] = 1
    return row / row.sum()


def test_attention_methods_of_matching_equal_their_oracles(blip):
    """The words' rows of the last text block are read by no score: chains cross to the image one block before."""
    methods = ["rollout", "gradient_rollout", "attention", "cross_attention", "grad_x_attention"]
    found = explain(blip, noise(50, 40), TEXT, methods=methods)
    expected = {name: [] for name in methods}
    for index, (*_, pairs) in enumerate(loop(blip, "matching", KEYS)):
        image, cross = pairs["vision"], pairs["cross"]
        row = start(index, cross[0][0].shape[1])
        crossed = row @ cross[-2][0].mean(0)
        expected["rollout"].append(crossed @ vision.rollout([weights for weights, _ in image]))
        expected["gradient_rollout"].append(crossed @ vision.gradient_rollout(image))
        expected["attention"].append(crossed @ image[-1][0].mean(0))
        expected["cross_attention"].append(row @ cross[-1][0].mean(0))
        expected["grad_x_attention"].append(sum(matching.albef(*cross[-2], q) for q in np.flatnonzero(row)))
    for name in methods:
        assert close(found.methods[name].maps, np.array(expected[name])[:, 1:].reshape(-1, 4, 4))


@pytest.mark.parametrize("encoder", ["rollout", "relevance"])
def test_relevance_of_matching_equals_the_bimodal_rule(blip, encoder):
    options = {"relevance.encoder": encoder}
    found = explain(blip, noise(50, 40), TEXT, methods=["relevance"], options=options).methods["relevance"].maps
    expected = []
    for index, (*_, pairs) in enumerate(loop(blip, "matching", KEYS)):
        if encoder == "rollout":
            chained = vision.rollout([weights for weights, _ in pairs["vision"]])
        else:
            chained = matching.normalised(vision.relevance(pairs["vision"]))
        relevancy = matching.bimodal_relevance(pairs["text"], pairs["cross"], chained)
        expected.append(start(index, len(relevancy)) @ relevancy)
    assert close(found, np.array(expected)[:, 1:].reshape(-1, 4, 4))


@pytest.mark.parametrize("kind", ["similarity", "norm"])
def test_attention_methods_of_the_image_encoder(blip, kind):
    methods = ["rollout", "relevance", "gradient_rollout", "grad_x_attention"]
    found = explain(blip, noise(50, 40), TEXT, target=kind, methods=methods, select=Selection(tokens=False))
    pairs = loop(blip, kind, f"{BLOCK}.0")[0][-1]["vision"]
    expected = {
        "rollout": vision.rollout([weights for weights, _ in pairs])[0],
        "relevance": vision.relevance(pairs)[0],
        "gradient_rollout": vision.gradient_rollout(pairs)[0],
        "grad_x_attention": matching.albef(*pairs[-1], 0),
    }
    for name in methods:
        assert close(found.methods[name].maps[0].ravel(), expected[name][1:])


def test_block_8_of_12_is_the_map_of_albef():
    """The published visualisation: cross-attention of block 8, weights times positive gradients, mean over heads."""
    adapter = models.blip_adapter(layers=12)
    options = {"grad_x_attention.stack": "cross", "grad_x_attention.layer": 8}
    found = explain(adapter, noise(50, 40), TEXT, methods=["grad_x_attention"], options=options)
    for index, (*_, pairs) in enumerate(loop(adapter, "matching", KEYS)):
        rows = np.flatnonzero(start(index, pairs["cross"][8][0].shape[1]))
        expected = sum(matching.albef(*pairs["cross"][8], row) for row in rows)
        assert close(found.methods["grad_x_attention"].maps[index].ravel(), expected[1:])


def test_the_words_of_the_last_block_have_no_gradient(blip):
    """The matching head reads the first row of the last block: those of the words are refused there."""
    call = {"methods": ["gradient_x_cross_attention"]}
    with pytest.raises(LayerError, match=r"block -1 of the cross stack is dead: .*; use layer=-2"):
        explain(blip, noise(50, 40), TEXT, **call, options={"gradient_x_cross_attention.layer": -1})
    found = explain(blip, noise(50, 40), TEXT, **call)
    general = explain(blip, noise(50, 40), TEXT, methods=["grad_x_attention"])
    [expected], [maps] = general.methods.values(), found.methods.values()
    assert np.array_equal(maps.maps, expected.maps)


@pytest.mark.parametrize("gradient", [False, True])
def test_recording_changes_no_score(blip, gradient):
    inputs = prepare(blip, [noise(50, 40)], [[TEXT, "two dogs"]], "matching")
    spans = [[text.caption(), *text.tokens()] for text in inputs.texts]
    targets = blip.targets(inputs, spans, "matching")
    paths = [path for stack in blip.structure("matching").stacks.values() for path in stack.attention]
    assert len(paths) == 9
    with Recorder(blip.model):
        plain = blip.forward(inputs, targets)
    with Recorder(blip.model, attention=dict.fromkeys(paths, gradient)) as recorder:
        recorded = blip.forward(inputs, targets)
        recorder.check()
    assert torch.equal(plain, recorded.detach())


@pytest.mark.parametrize("stack", ["vision", "text", "cross"])
def test_attention_is_attention(blip, stack):
    """Rows sum to 1 over what is not masked, and padding of the shorter text is masked."""
    inputs = prepare(blip, [noise(50, 40)], [["two dogs", TEXT]], "matching")
    for weights in attentions(blip, inputs, stack):
        assert weights.sum(-1).numpy() == pytest.approx(1)
        assert weights.std() > 0.001
    if stack == "text":
        padding = inputs.tensors["attention_mask"][0] == 0
        assert padding.any()
        assert weights[0][..., padding].max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_single_images_and_texts(blip, kind):
    images, texts = [noise(50, 40, 1), noise(30, 70, 2)], [[TEXT, "two dogs"], ["red car"]]
    methods = ["gradcam", "relevance", "rollout"]
    together = explain(blip, images, texts, target=kind, methods=methods)
    for image, own, explanations in zip(images, texts, together, strict=True):
        for text, found in zip(own, explanations, strict=True):
            alone = explain(blip, image, text, target=kind, methods=methods)
            assert [entry.label for entry in found.entries] == [entry.label for entry in alone.entries]
            for name in methods:
                assert close(found.methods[name].maps, alone.methods[name].maps)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_is_a_text_of_its_own(blip, kind):
    words = Selection(words=True, phrases=["red jacket"])
    methods = ["gradcam", "rollout"]
    found = explain(blip, noise(50, 40), TEXT, target=kind, methods=methods, token_target="alone", select=words)
    for text, index in (("red", 5), ("red jacket", -1)):
        assert found.entries[index].label == text
        own = explain(blip, noise(50, 40), text, target=kind, methods=methods)
        assert close(found.entries[index].score, own.entries[0].score)
        for name in methods:
            if found.methods[name].text_conditioned:
                assert close(found.methods[name].maps[index], own.methods[name].maps[0])


def test_one_image_pass_and_two_backwards_for_all_tokens_left_out(blip, monkeypatch):
    asked = {"methods": ["gradient_x_cross_attention", "rollout"], "options": {"gradient_x_cross_attention.layer": -2}}
    explain(blip, noise(50, 40), TEXT, **asked)  # the first recorded pass is compared with a plain one
    passes, texts, backwards, plain = [], [], [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or plain(*a, **k))
    handles = [
        blip.model.vision_model.encoder.register_forward_hook(lambda *_: passes.append(1)),
        blip.model.text_encoder.register_forward_hook(lambda _m, _a, out: texts.append(len(out[0]))),
    ]
    found = explain(blip, noise(50, 40), TEXT, **asked)
    for handle in handles:
        handle.remove()
    assert len(passes) == 1
    assert texts == [len(found.entries)]  # the caption once, and once without each token
    assert len(backwards) == 2


def test_a_long_text_is_cut_and_said(blip):
    for kind in KINDS:
        found = explain(blip, noise(50, 40), "man " * 40, target=kind, methods=["rollout"])
        assert any("longer than the model's 24 tokens; cut off:" in warning for warning in found.warnings)


def test_which_layers_are_live(blip):
    layers = {layer.path: layer for layer in list_layers(blip, noise(50, 40), TEXT, "matching")}
    assert layers[KEYS].default
    assert all(layer.live for layer in layers.values())  # every patch is a key
    assert layers[f"{BLOCK}.2"].alias == "2"
    assert not any(path.startswith("text_encoder") for path in layers)
    layers = {layer.path: layer for layer in list_layers(blip, noise(50, 40), TEXT, "similarity")}
    assert layers[f"{BLOCK}.2.layer_norm1"].default
    assert layers[f"{BLOCK}.2.layer_norm1"].live
    assert not layers[f"{BLOCK}.2"].live
    with pytest.raises(LayerError, match="has text tokens only, no patches"):
        explain(blip, noise(50, 40), TEXT, methods=["gradcam"], layers=["text_encoder.embeddings"])


def test_the_model_has_no_scale_and_no_other_targets(blip):
    with pytest.raises(TargetError, match=r"blip has no target 'logits'.*it has: matching, similarity, norm"):
        explain(blip, noise(50, 40), TEXT, target="logits")
    norm = explain(blip, noise(50, 40), target="norm", methods=["gradcam"])
    assert close(norm.entries[0].score, loop(blip, "norm", f"{BLOCK}.0")[0][0])


@pytest.mark.parametrize("kind", ["similarity", "norm"])
@pytest.mark.parametrize("rule", [None, "layernorm"])
def test_the_shortcut_equals_the_general_path(blip, kind, rule):
    texts = [] if kind == "norm" else [TEXT, "two dogs"]
    inputs = prepare(blip, [noise(50, 40), noise(30, 70, 2)], [texts or [None], texts[:1] or [None]], kind)
    spans = [[text.caption(), *text.tokens()] for text in inputs.texts]
    targets, shortcut = blip.targets(inputs, spans, kind), blip.shortcut(kind)
    assert list(shortcut.layers) == [f"{BLOCK}.2.layer_norm1", f"{BLOCK}.1"]
    for layer, others in shortcut.layers.items():
        with Recorder(blip.model, dict.fromkeys([layer, *others], False)) as recorder:
            blip.forward(inputs, targets)
        found = shortcut.pooled_gradient(layer, inputs, targets, recorder.outputs, rule)
        assert close(found, pooled_gradient(blip, inputs, targets, layer, rule))


@pytest.mark.parametrize("token_target", ["leave-one-out", "alone"])
@pytest.mark.parametrize("rule", [None, "layernorm"])
def test_the_shortcut_of_matching_equals_the_general_path(blip, token_target, rule, monkeypatch):
    """Also where the sequences do not fit on one graph."""
    inputs = prepare(blip, [noise(50, 40), noise(30, 70, 2)], [[TEXT, "two dogs"], ["red car"]], "matching")
    spans = [[text.caption(), *text.tokens()] for text in inputs.texts]
    targets = blip.targets(inputs, spans, "matching", token_target)
    with Recorder(blip.model, {KEYS: False}) as recorder:
        blip.forward(inputs, targets)
    shortcut = blip.shortcut("matching")
    found = shortcut.pooled_gradient(KEYS, inputs, targets, recorder.outputs, rule)
    assert close(found, pooled_gradient(blip, inputs, targets, KEYS, rule))
    monkeypatch.setattr("adapters.blip.adapter.SEQUENCES", 4)
    assert close(shortcut.pooled_gradient(KEYS, inputs, targets, recorder.outputs, rule), found)
    chosen = targets.select([3, 0])
    assert close(shortcut.pooled_gradient(KEYS, inputs, chosen, recorder.outputs, rule), found[[3, 0]])


@pytest.mark.parametrize("method", ["gradcam", "gradcam_ln"])
def test_one_backward_for_the_maps_of_all_tokens_left_out(blip, method, monkeypatch):
    backwards, plain = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or plain(*a, **k))
    found = explain(blip, noise(50, 40), TEXT, methods=[method])
    fast = len(backwards)
    monkeypatch.setattr(type(blip), "shortcut", lambda *_: None)
    slow = explain(blip, noise(50, 40), TEXT, methods=[method])
    assert close(found.methods[method].maps, slow.methods[method].maps)
    assert len(backwards) - fast == len(found.entries) == 7
    assert fast <= 2  # the second is the check whether the gradient is orthogonal to the features


def test_a_modified_last_block_or_norm_has_no_shortcut(blip):
    handle = blip.model.vision_model.post_layernorm.register_forward_hook(lambda _m, _a, out: 0.5 * out)
    assert blip.shortcut("matching") is None
    handle.remove()
    assert blip.shortcut("matching") is not None
    blip.model.vision_model.encoder.layers[-1].self_attn.qkv.register_forward_hook(lambda _m, _a, out: 0.5 * out)
    assert blip.shortcut("similarity") is None
    found = explain(blip, noise(50, 40), TEXT, target="similarity", methods=["gradcam"])
    layer = f"{BLOCK}.2.layer_norm1"
    expected = [vision.gradcam(patches(f), patches(g)) for _, f, g, _ in loop(blip, "similarity", layer)]
    assert close(found.methods["gradcam"].maps.reshape(len(expected), -1), expected)


def test_an_input_of_another_size_interpolates_positions(blip):
    blip.image_processor.size = {"height": 32, "width": 48}
    found = explain(blip, noise(50, 40), TEXT, methods=["gradcam"], select=Selection(tokens=False))
    assert found.methods["gradcam"].maps.shape == (1, 4, 6)
    encoded = blip.tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        logits = blip.model(encoded["input_ids"], pixels(blip, noise(50, 40)), interpolate_pos_encoding=True).itm_score[
            0
        ]
    assert close(found.entries[0].score, logits[1] - logits[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.save(models.blip_adapter(), tmp_path_factory.mktemp("tiny-blip"))


def test_a_checkpoint_loads_and_the_commands_run(checkpoint, tmp_path, capsys):
    assert checkpoints.loads_by_name(checkpoint, BlipAdapter).info.type == "blip"
    out, _ = checkpoints.commands_run(checkpoint, tmp_path, capsys, KEYS)
    assert "gradcam" in out


@pytest.mark.slow
def test_a_batch_run_survives_a_kill(checkpoint, tmp_path):
    checkpoints.survives_a_kill(checkpoint, tmp_path)
