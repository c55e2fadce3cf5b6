"""FLAVA: every target against a plain loop, and known mistakes of tutorials."""

import numpy as np
import pytest
import torch

from grounding import Selection, explain
from grounding.core.errors import LayerError, OptionError, TargetError
from grounding.engine.layers import list_layers
from grounding.engine.queries import prepare
from grounding.engine.signals import attentions
from grounding.methods.trace import Trace
from tests.support import models
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.tolerances import ORACLE, TUTORIAL, close
from tests.support.tutorials.flava import FUSION, PATCHES, TEXT, entries, loop, patches

KINDS = ("similarity", "matching", "logit")
VISION = {
    "patch projection": "flava.image_model.embeddings.patch_embeddings.projection",
    "block input": "flava.image_model.encoder.layer.2.layernorm_before",
    "inner block": "flava.image_model.encoder.layer.0",
}


@pytest.fixture
def flava():
    return models.flava_adapter()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ORACLE), (torch.float32, TUTORIAL)])
def test_gradcam_in_the_image_tower_equals_a_plain_loop(kind, dtype, tolerance):
    adapter = models.flava_adapter(dtype=dtype)
    layers = [*VISION.values(), *([] if kind == "similarity" else ["flava.image_model.encoder.layer.2"])]
    found = explain(adapter, noise(50, 40), TEXT, target=kind, methods=["gradcam"], layers=layers, select=entries(kind))
    for layer in layers:
        runs = loop(adapter, kind, layer)
        expected = [vision.gradcam(patches(f), patches(g)) for _, f, g, *_ in runs]
        assert close(found.methods[f"gradcam@{layer}"].maps.reshape(len(runs), -1), expected, tolerance)
        assert close([e.score for e in found.entries], [r[0] for r in runs], tolerance)


@pytest.mark.parametrize("kind", ["matching", "logit"])
@pytest.mark.parametrize("method", ["gradcam", "gradcam_ln"])
@pytest.mark.parametrize("layer", FUSION)
def test_gradcam_in_the_multimodal_encoder_equals_a_plain_loop(flava, kind, method, layer, monkeypatch):
    found = explain(flava, noise(50, 40), TEXT, target=kind, methods=[method], layers=[layer], select=entries(kind))
    if method == "gradcam_ln":
        monkeypatch.setattr(torch.nn.LayerNorm, "forward", vision.constant_deviation_norm)
    runs = loop(flava, kind, FUSION[layer])
    expected = [sum(vision.gradcam(patches(f, 2), patches(g, 2)) for f, g in [run[1:3], *run[4]]) for run in runs]
    assert close(found.methods[method].maps.reshape(len(runs), -1), expected)


def start(kind, index, length):
    """Where chains of attention start: the token's own place, of a caption the mean over its tokens'."""
    row = np.zeros(length)
    words = np.arange(2 + PATCHES + 1, length - 1)
    row[words if kind == "matching" and index == 0 else [2 + PATCHES + index + (kind == "logit")]] = 1
    return row / row.sum()


@pytest.mark.parametrize("kind", ["matching", "logit"])
def test_attention_methods_equal_their_oracles_through_both_encoders(flava, kind):
    methods = ["rollout", "gradient_rollout", "attention", "attention_gradcam", "relevance"]
    found = explain(flava, noise(50, 40), TEXT, target=kind, methods=methods, select=entries(kind))
    expected = {name: [] for name in methods}
    for index, (*_, pairs, _) in enumerate(loop(flava, kind, VISION["inner block"])):
        seeing, fusing = pairs["image_model"], pairs["multimodal_model"]
        row = start(kind, index, fusing[0][0].shape[-1])
        image = slice(1, 2 + PATCHES)  # the image's own CLS and its patches
        rolled = (row @ vision.rollout([a for a, _ in fusing]))[image]
        expected["rollout"].append(rolled @ vision.rollout([a for a, _ in seeing]))
        expected["gradient_rollout"].append(rolled @ vision.gradient_rollout(seeing))
        expected["attention"].append(rolled @ seeing[-1][0].mean(0))
        expected["attention_gradcam"].append(((row > 0) @ vision.attention_gradcam(*fusing[-2]))[image])
        expected["relevance"].append((row @ vision.relevance(fusing))[image] @ vision.relevance(seeing))
    for name in methods:
        assert close(found.methods[name].maps, np.array(expected[name])[:, 1:].reshape(-1, 4, 4))


@pytest.mark.parametrize("kind", ["similarity", "norm"])
def test_attention_methods_of_the_image_tower(flava, kind):
    methods = ["rollout", "relevance", "gradient_rollout"]
    found = explain(flava, noise(50, 40), TEXT, target=kind, methods=methods, select=Selection(tokens=False))
    pairs = loop(flava, kind, VISION["inner block"])[0][3]["image_model"]
    expected = {
        "rollout": vision.rollout([a for a, _ in pairs]),
        "relevance": vision.relevance(pairs),
        "gradient_rollout": vision.gradient_rollout(pairs),
    }
    for name in methods:
        assert close(found.methods[name].maps[0].ravel(), expected[name][0, 1:])


def test_one_layer_and_one_head_of_the_attention(flava):
    """The known tutorial's "attention" is context vectors, and its head number indexes the batch."""
    options = {"attention.layer": 1, "attention.head": 3}
    found = explain(flava, noise(50, 40), TEXT, methods=["attention"], options=options)
    weights = loop(flava, "similarity", VISION["inner block"])[0][3]["image_model"][1][0]
    assert close(found.methods["attention"].maps[0].ravel(), weights[3, 0, 1:])
    with pytest.raises(LayerError, match=r"attention.head: 4 is not in -4 to 3"):
        explain(flava, noise(50, 40), TEXT, methods=["attention"], options={"attention.head": 4})


@pytest.mark.parametrize("stack", ["vision", "fusion", "text"])
def test_attention_is_attention(stack):
    """Rows sum to 1 over what is not masked; averaged over the keys, as the tutorial does, it would be constant."""
    adapter = models.flava_adapter(kind="matching")
    inputs = prepare(adapter, [noise(50, 40)], [["two dogs", TEXT]])
    for weights in attentions(adapter, inputs, stack):
        assert weights.sum(-1).numpy() == pytest.approx(1)
        assert weights.std() > 0.001
        assert weights.mean(-1).std() < 1e-12
    if stack != "vision":
        padding = inputs.tensors["attention_mask"][0] == 0
        assert padding.any()
        assert weights[0][..., -len(padding) :][..., padding].max() < 1e-9


def test_the_caption_enters_its_map_and_where_it_does_not_that_is_said(flava):
    for kind in KINDS:
        first, second = (explain(flava, noise(50, 40), t, target=kind) for t in (TEXT, "two dogs"))
        assert np.abs(first.methods["gradcam"].maps[0] - second.methods["gradcam"].maps[0]).max() > 1e-6
        conditioned = {key: column.text_conditioned for key, column in first.methods.items()}
        assert conditioned == {"gradcam": True, "rollout": kind != "similarity", "relevance": True}
        warned = any("Attention rollout does not depend on the text" in w for w in first.warnings)
        assert warned == (kind == "similarity")
    first, second = (explain(flava, noise(50, 40), t, target="norm") for t in (TEXT, None))
    assert [(entry.kind, entry.label) for entry in first.entries] == [("image", "image")]
    for key, column in first.methods.items():
        assert not column.text_conditioned
        assert np.array_equal(column.maps, second.methods[key].maps)
    assert not any("does not depend on the text" in w for w in first.warnings)


def test_every_image_gets_its_own_map(flava):
    """A hook list that is never cleared would show the first image again and again."""
    images = [noise(50, 40, 1), noise(60, 40, 2)]
    for kind in KINDS:
        maps = [explain(flava, image, TEXT, target=kind).methods["gradcam"].maps for image in images]
        assert np.abs(maps[0] - maps[1]).max() > 1e-6
        together = explain(flava, images, [TEXT, TEXT], target=kind)
        for one, found in zip(maps, together, strict=True):
            assert close(found.methods["gradcam"].maps, one)
    left = [hook for module in flava.model.modules() for hook in module._forward_hooks.values()]
    assert all(getattr(hook, "__module__", "").startswith("transformers.") for hook in left)


def test_a_flat_image_divides_by_nothing(flava):
    from PIL import Image

    found = explain(flava, Image.new("RGB", (64, 64), "grey"), TEXT, target="norm")
    assert all(np.isfinite(column.maps).all() for column in found.methods.values())
    found.figure()


def test_words_and_phrases(flava):
    select = Selection(words=True, phrases=["red jacket"])
    tokens = explain(flava, noise(50, 40), TEXT, target="logit", methods=["gradcam"], select=Selection(caption=False))
    found = explain(flava, noise(50, 40), TEXT, target="logit", methods=["gradcam"], select=select)
    own = [i for i, e in enumerate(tokens.entries) if e.start >= TEXT.index("red")]
    assert close(found.methods["gradcam"].maps[-1], tokens.methods["gradcam"].maps[own].mean(0))
    for kind in ("similarity", "matching"):
        found = explain(flava, noise(50, 40), TEXT, target=kind, methods=["gradcam"], select=select)
        alone = explain(flava, noise(50, 40), "red jacket", target=kind, methods=["gradcam"])
        assert found.entries[-1].score == pytest.approx(alone.entries[0].score)
        assert close(found.methods["gradcam"].maps[-1], alone.methods["gradcam"].maps[0])
        alone = explain(flava, noise(50, 40), TEXT, target=kind, token_target="alone", select=Selection(tokens=["red"]))
        word = explain(flava, noise(50, 40), "red", target=kind)
        assert alone.entries[-1].score == pytest.approx(word.entries[0].score)


def test_one_image_pass_for_tokens_left_out(flava):
    asked = {"target": "matching", "methods": ["gradcam", "rollout"]}
    explain(flava, noise(50, 40), TEXT, **asked)  # the first recorded pass is compared with a plain one
    passes, fused = [], []
    handles = [
        flava.model.flava.image_model.register_forward_hook(lambda *_: passes.append(1)),
        flava.model.flava.multimodal_model.register_forward_hook(lambda m, a, out: fused.append(len(out[0]))),
    ]
    found = explain(flava, noise(50, 40), TEXT, **asked)
    for handle in handles:
        handle.remove()
    assert len(passes) == 1
    assert fused == [len(found.entries)]  # the caption once, and once without each token


def test_options_of_the_norm(flava):
    pixels = prepare(flava, [noise(50, 40)], [[TEXT]]).images.tensors["pixel_values"]
    states = flava.model.flava.get_image_features(pixels).pooler_output
    for tokens, expected in (("all", states.norm()), ("cls", states[:, 0].norm())):
        options = {"norm.tokens": tokens}
        found = explain(flava, noise(50, 40), TEXT, target="norm", methods=["gradcam"], options=options)
        assert found.entries[0].score == pytest.approx(expected.item())
    with pytest.raises(OptionError, match=r"there is norm\.tokens, all"):
        explain(flava, noise(50, 40), TEXT, target="norm", options={"norm.tokens": "some"})
    with pytest.raises(OptionError, match="belongs to the target norm, not to similarity"):
        explain(flava, noise(50, 40), TEXT, options={"norm.tokens": "cls"})


def test_what_a_model_without_heads_cannot_do():
    bare = models.flava_adapter(heads=False)
    assert explain(bare, noise(50, 40), TEXT).target == "similarity"
    with pytest.raises(TargetError, match="target 'matching' needs the heads of FlavaForPreTraining"):
        explain(bare, noise(50, 40), TEXT, target="matching")
    with pytest.raises(TargetError, match="each token has a score of its own"):
        explain(models.flava_adapter(), noise(50, 40), TEXT, target="logit", token_target="alone")


def test_a_long_text_is_cut_and_said(flava):
    for kind in KINDS:
        found = explain(flava, noise(50, 40), "man " * 40, target=kind, methods=["rollout"])
        assert any("longer than the model's 24 tokens; cut off:" in w for w in found.warnings)


def test_layers_of_both_encoders_are_listed(flava):
    layers = {layer.alias: layer for layer in list_layers(flava, noise(50, 40), TEXT, "matching")}
    assert layers["fusion:0.in"].default
    assert layers["fusion:0"].live
    assert not layers["fusion:2"].live  # behind the last block the matching head reads the CLS alone
    towers = {layer.alias: layer for layer in list_layers(flava, noise(50, 40), TEXT)}
    assert towers["2.in"].default
    assert not towers["2"].live
    with pytest.raises(LayerError, match="is dead"):
        explain(flava, noise(50, 40), TEXT, methods=["gradcam"], layers=["-1"])
    with pytest.raises(LayerError, match="has no stack 'fusion'"):
        explain(flava, noise(50, 40), TEXT, methods=["gradcam"], layers=["fusion:-1.in"])


def test_maps_that_cannot_tell_parts_apart_say_so(flava, monkeypatch):
    for kind in KINDS:
        for layer in ("0", "fusion:0", "fusion:-1.in"):
            if kind != "similarity" or layer == "0":
                found = explain(flava, noise(50, 40), TEXT, target=kind, methods=["gradcam"], layers=[layer])
                assert not any("cannot distinguish the parts" in w for w in found.warnings)
    monkeypatch.setattr(Trace, "weighted", lambda trace, weights, **_: torch.ones(len(weights), *trace.grid))
    found = explain(flava, noise(50, 40), TEXT, methods=["gradcam"])
    assert any("Grad-CAM cannot distinguish the parts of this text here" in w for w in found.warnings)


def test_a_target_without_text_costs_one_backward(flava, monkeypatch):
    backwards, plain = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or plain(*a, **k))
    explain(flava, noise(50, 40), TEXT, target="norm", methods=["gradcam", "relevance"])
    assert len(backwards) == 1


def test_two_backwards_for_all_tokens_left_out(flava, monkeypatch):
    """A caption's own sequence has one gradient, those without a token are one token's each."""
    backwards, plain = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or plain(*a, **k))
    found = explain(flava, noise(50, 40), TEXT, target="matching", methods=["gradcam"])
    assert len(found.entries) == 7
    assert len(backwards) == 2
