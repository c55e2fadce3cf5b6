"""SigLIP: scores against the model's own, texts and their padding, the pooling head, maps against slow oracles."""

import numpy as np
import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from adapters.siglip.adapter import SiglipAdapter
from adapters.siglip.pooling_head import ATTENTION, NORM
from adapters.siglip.sentencepiece_offsets import OffsetTokenizer, piece_offsets, with_offsets
from grounding import Selection, explain
from grounding.adapter.recorder import Recorder
from grounding.core.errors import ModelError, TextError
from grounding.engine import signals
from grounding.engine.passes import run_passes
from grounding.engine.plan import plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request
from tests.support import siglip
from tests.support.images import noise
from tests.support.oracles import pooling, vision
from tests.support.oracles.towers import Tower
from tests.support.tolerances import ORACLE, SINGLE, close

CAPTION = "A man, in a red jacket!"
TEXTS = [CAPTION, "two dogs playing on the green grass"]


@pytest.fixture
def adapter():
    return siglip.siglip_adapter()


def pixels_of(adapter, image):
    return adapter.prepare_images([image]).tensors["pixel_values"]


def directions(adapter, text=CAPTION):
    """The caption's embedding, and its loss without each of its tokens, by the model's own text encoder."""
    whole = siglip.text_embedding(adapter, text)
    count = len(adapter.tokenizer(text)["input_ids"])
    first = siglip.LENGTH - count if adapter.tokenizer.padding_side == "left" else 0
    left = [siglip.text_embedding(adapter, text, [first + i]) for i in range(count - 1)]
    return [whole, *(whole - other for other in left)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_are_the_models_own(side, dtype):
    adapter = siglip.siglip_adapter(side=side, dtype=dtype)
    images = [noise(90, 60), noise(50, 70, 3)]
    inputs = prepare(adapter, images, [TEXTS, TEXTS])
    targets = adapter.targets(inputs, [[text.caption()] for text in inputs.texts], "logits")
    ids = adapter.tokenizer(TEXTS, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = adapter.model(input_ids=ids, pixel_values=inputs.images.tensors["pixel_values"])
    found = signals.scores(adapter, inputs, targets)
    assert close(found.reshape(2, 2), expected.logits_per_image, 1e-5)
    embedded = adapter.encode_images(inputs.images)
    probabilities = adapter.probabilities(inputs, embedded, targets)
    assert close([p for p, _ in probabilities], expected.logits_per_image.sigmoid().flatten(), 1e-5)
    similar = adapter.targets(inputs, [[text.caption()] for text in inputs.texts], "similarity")
    assert close([p for p, _ in adapter.probabilities(inputs, embedded, similar)], [p for p, _ in probabilities], 1e-5)


def test_no_mask_reaches_the_model_and_texts_have_the_full_length(adapter, monkeypatch):
    seen = []
    own = adapter.model.get_text_features
    monkeypatch.setattr(adapter.model, "get_text_features", lambda **given: seen.append(given) or own(**given))
    inputs = prepare(adapter, [noise()], [["red car"]])
    adapter.targets(inputs, [[inputs.texts[0].caption()]], "similarity")
    [given] = seen
    assert given["attention_mask"] is None
    assert given["input_ids"].shape == (1, siglip.LENGTH)
    adapter.targets(inputs, [[inputs.texts[0].tokens()[0]]], "similarity")
    masks = [given["attention_mask"] for given in seen[1:] if given["attention_mask"] is not None]
    assert [mask.tolist() for mask in masks] == [[[0] + [1] * (siglip.LENGTH - 1)]]


def test_a_padding_mask_or_a_shorter_text_would_change_the_score(adapter):
    """The test above cannot pass by chance: padding is read by the model."""
    encoded = adapter.tokenizer("red car", padding="max_length", return_tensors="pt")
    whole = siglip.text_embedding(adapter, "red car")
    with torch.no_grad():
        for given in (encoded, adapter.tokenizer("red car", return_tensors="pt")):
            given = {name: given[name] for name in ("input_ids", "attention_mask")}
            other = adapter.model.get_text_features(**given).pooler_output[0]
            assert (other / other.norm() - whole).norm() > 0.1


@pytest.mark.parametrize("side", ["right", "left"])
def test_leave_one_out_is_the_model_with_that_mask(side):
    adapter = siglip.siglip_adapter(side=side)
    found = explain(adapter, noise(90, 60), CAPTION, methods=["rollout"])
    with torch.no_grad():
        embedded = adapter.model.get_image_features(pixels_of(adapter, noise(90, 60))).pooler_output[0]
    expected = [direction @ embedded / embedded.norm() for direction in directions(adapter)]
    assert [entry.label for entry in found.entries] == [CAPTION, "A", "man", "in", "a", "red", "jacket"]
    assert close([entry.score for entry in found.entries], expected)
    assert [entry.probability is None for entry in found.entries] == [False] + [True] * 6
    logits = explain(adapter, noise(90, 60), CAPTION, methods=["rollout"], target="logits")
    scale = adapter.model.logit_scale.exp().item()
    assert close([e.score for e in logits.entries[1:]], [scale * e for e in expected[1:]])  # the bias cancels
    assert logits.entries[0].score == pytest.approx(scale * expected[0].item() + adapter.model.logit_bias.item())
    assert logits.entries[0].probability == pytest.approx(found.entries[0].probability)


@pytest.mark.parametrize("side", ["right", "left"])
def test_alone_is_a_text_of_its_own_at_full_length(side):
    adapter = siglip.siglip_adapter(side=side)
    select = Selection(caption=False, words=True, phrases=["red jacket"])
    found = explain(adapter, noise(90, 60), CAPTION, methods=["rollout"], token_target="alone", select=select)
    with torch.no_grad():
        embedded = adapter.model.get_image_features(pixels_of(adapter, noise(90, 60))).pooler_output[0]
    for entry in found.entries:
        direction = siglip.text_embedding(adapter, entry.label)
        assert close(entry.score, direction @ embedded / embedded.norm())
        assert entry.probability == pytest.approx(
            torch.sigmoid(adapter.model.logit_scale.exp() * entry.score + adapter.model.logit_bias).item()
        )
    assert {"man", "red jacket"} <= {entry.label for entry in found.entries}


def test_tokens_are_the_texts_own_with_offsets_and_warnings(adapter):
    long = "a man in a red jacket and a blue car and two dogs playing on the green grass, photogenic women jumps over"
    [text] = prepare(adapter, [noise()], [[long]]).texts
    assert len(text) == siglip.LENGTH
    assert text.dropped
    assert any("longer than the model's 24 tokens" in warning for warning in text.warnings)
    [text] = prepare(adapter, [noise()], [["Red CAR -- #7"]]).texts
    assert [span.label for span in text.tokens()][:2] == ["Red", "CAR"]
    assert any("outside the vocabulary" in warning for warning in text.warnings)
    assert len(text) < siglip.LENGTH
    with pytest.raises(TextError, match="finds no token"):
        prepare(adapter, [noise()], [["?!"]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_recorded_pooling_head_is_the_models_own(dtype):
    adapter = siglip.siglip_adapter(dtype=dtype)
    pixels = pixels_of(adapter, noise(90, 60))
    with torch.no_grad():
        plain = adapter.model.vision_model(pixels)
        probe, head = adapter.model.vision_model.head.probe, adapter.model.vision_model.head.attention
        tokens = plain.last_hidden_state
        expected = head(probe, tokens, tokens, average_attn_weights=False)[1]
    with Recorder(adapter.model, {NORM: True}, {ATTENTION: True}) as recorder:
        output = adapter.model.get_image_features(pixels).pooler_output
        [gradient] = torch.autograd.grad(output[0, 0], recorder.weights[ATTENTION])
    assert close(output.detach(), plain.pooler_output, 1e-5)
    assert close(recorder.weights[ATTENTION].detach(), expected, 1e-5)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("pixels", [(32, 32), (24, 48)])
def test_maps_equal_plain_loops(pixels):
    """Rollout, relevance and Grad-CAM of the caption and each token left out, from their definitions."""
    adapter = siglip.siglip_adapter(pixels=pixels)
    image = noise(90, 60)
    methods = ["gradcam", "hirescam", "rollout", "relevance", "gradient_rollout"]
    found = explain(adapter, image, CAPTION, methods=methods)
    tower = Tower(adapter.model, pixels_of(adapter, image))
    if pixels != (32, 32):
        embedded = adapter.model.vision_model.embeddings(pixels_of(adapter, image), interpolate_pos_encoding=True)
        tower.embedded = lambda: embedded[0]
    for k, direction in enumerate(directions(adapter)):
        own = pooling.run(tower, direction)
        assert found.entries[k].score == pytest.approx(own.score, abs=1e-9)
        for name, expected in (
            ("gradcam", vision.gradcam(*own.normed)),
            ("hirescam", vision.hirescam(*own.normed)),
            ("relevance", pooling.relevance(own)),
            ("gradient_rollout", pooling.gradient_rollout(own)),
        ):
            assert close(found.methods[name].maps[k].ravel(), expected)
        assert close(found.methods["rollout"].maps[0].ravel(), pooling.rollout(own))


@pytest.mark.parametrize("layer", [NORM, "-1"])
def test_the_layernorm_rule_equals_a_plain_loop(adapter, layer):
    image = noise(90, 60)
    found = explain(adapter, image, CAPTION, methods=["gradcam_ln"], layers=[layer])
    tower = Tower(adapter.model, pixels_of(adapter, image), detach=True)
    for k, direction in enumerate(directions(adapter)):
        own = pooling.run(tower, direction)
        expected = vision.gradcam(*(own.normed if layer == NORM else own.last))
        assert close(found.methods["gradcam_ln"].maps[k].ravel(), expected)


@pytest.mark.parametrize("rule", [None, "layernorm"])
@pytest.mark.parametrize("kind", ["similarity", "logits", "norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_shortcut_equals_the_general_path(rule, kind, dtype):
    adapter = siglip.siglip_adapter(dtype=dtype)
    inputs = prepare(adapter, [noise(90, 60), noise(50, 70, 3)], [TEXTS, ["red car"]])
    targets = adapter.targets(inputs, [[t.caption(), *t.tokens()] for t in inputs.texts], kind)
    shortcut = adapter.shortcut(kind)
    assert set(shortcut.layers) == {NORM, "vision_model.encoder.layers.2"}
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


def test_the_last_block_is_read_through_a_norm_and_the_default_is_not(adapter):
    assert adapter.structure("logits").default_layer == NORM
    assert not explain(adapter, noise(), "red car", methods=["gradcam"]).warnings
    [warning] = explain(adapter, noise(), "red car", methods=["gradcam"], layers=["-1"]).warnings
    assert "read through a LayerNorm alone" in warning


@pytest.mark.parametrize("change", ["hook", "forward", "parent", "wrapper"])
def test_a_changed_head_is_run_and_not_recomputed(adapter, change):
    vision_model = adapter.model.vision_model
    before = explain(adapter, noise(90, 60), CAPTION, methods=["gradcam"])
    if change == "hook":
        vision_model.head.mlp.register_forward_hook(lambda _m, _a, out: 0.1 * out)
    elif change == "forward":
        plain = vision_model.head.layernorm.forward
        vision_model.head.layernorm.forward = lambda x: -2 * plain(x)
    elif change == "parent":
        vision_model.head.register_forward_hook(lambda _m, _a, out: out.roll(1, -1))
    else:
        vision_model.head.mlp.fc1 = torch.nn.Sequential(vision_model.head.mlp.fc1, torch.nn.ReLU())
    assert adapter.shortcut("similarity") is None
    inputs = prepare(adapter, [noise(90, 60)], [[CAPTION]])
    targets = adapter.targets(inputs, [[inputs.texts[0].caption()]], "similarity")
    expected = signals.pooled_gradient(adapter, inputs, targets, NORM)
    [chunk] = run_passes(adapter, inputs, targets, plan_methods(adapter, Request(["gradcam"])))
    assert close(chunk.trace.at(NORM, frozenset({"pooled_gradient"})).pooled_gradient(), expected)
    found = explain(adapter, noise(90, 60), CAPTION, methods=["gradcam"])
    assert np.abs(found[0].raw - before[0].raw).max() > 0.01 * np.abs(before[0].raw).max()


def test_a_batch_of_unequal_images_equals_single_ones(adapter):
    images = [noise(90, 60), noise(50, 70, 3), noise(33, 200, 5)]
    methods = ["gradcam", "rollout", "relevance"]
    together = explain(adapter, images, [TEXTS] * 3, methods=methods)
    for image, own in zip(images, together, strict=True):
        for text, found in zip(TEXTS, own, strict=True):
            single = explain(adapter, image, text, methods=methods)
            assert close([e.score for e in found.entries], [e.score for e in single.entries])
            for name in methods:
                assert close(found.methods[name].maps, single.methods[name].maps)


def test_the_head_is_read_by_its_output_and_its_weights_in_one_pass(adapter):
    """Grad-CAM reads the output of the pooling attention, rollout its weights: both of the same module."""
    image = noise(90, 60)
    for targets in ("similarity", "norm"):
        both = explain(adapter, image, CAPTION, methods=["gradcam", "rollout"], target=targets)
        for name in ("gradcam", "rollout"):
            single = explain(adapter, image, CAPTION, methods=[name], target=targets)
            assert close(both.methods[name].maps, single.methods[name].maps)


def test_a_model_without_its_head_is_refused():
    config = siglip.configuration(SiglipConfig, {"image_size": 32, "patch_size": 8, "vision_use_head": False}, 1)
    parts = siglip.siglip_adapter()
    with pytest.raises(ModelError, match="needs a model with attention pooling"):
        SiglipAdapter(SiglipModel(config), tokenizer=parts.tokenizer, image_processor=parts.image_processor)
    with pytest.raises(ModelError, match="needs a processor, or a tokenizer and an image_processor"):
        SiglipAdapter(siglip.siglip_model())


# ---------------------------------------------------------------- offsets of the SentencePiece tokenizer


@pytest.mark.parametrize(
    ("text", "pieces", "parts"),
    [
        ("A man, in RED", ["\u2581a", "\u2581", "m", "an", "\u2581in", "\u2581re", "d"],
         ["A", " ", "m", "an", "in", "RE", "D"]),
        ("\u0130stanbul", ["\u2581i", "\u0307", "stanbul"], ["\u0130", "\u0130", "stanbul"]),
        ("caf\u0065\u0301 \ufb01n", ["\u2581caf", "\u00e9", "\u2581fin"], ["caf", "\u0065\u0301", "\ufb01n"]),
        ("\u2026dogs \u039f\u03a3", ["\u2581", "...", "dogs", "\u2581\u03bf\u03c2"],
         ["", "\u2026", "dogs", "\u039f\u03a3"]),
        ("e-mail", ["\u2581e", "mail"], ["e", "mail"]),
    ],
)  # fmt: skip
def test_pieces_are_placed_in_the_text_as_given(text, pieces, parts):
    assert [text[start:end] for start, end in piece_offsets(text, pieces)] == parts


def test_a_piece_that_is_not_in_the_text_is_refused():
    with pytest.raises(TextError, match="piece 'cat' matches no part of 'dog'"):
        piece_offsets("dog", ["cat"])


def test_a_sentencepiece_tokenizer_works_as_a_fast_one(tmp_path, monkeypatch):
    """The real tokenizer, where the optional sentencepiece is installed: ids are its own."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    from transformers import SiglipTokenizer

    (tmp_path / "corpus").write_text("\n".join(siglip.CORPUS * 3))
    trainer.train(
        input=str(tmp_path / "corpus"), model_prefix=str(tmp_path / "spiece"), vocab_size=60, pad_id=-1, bos_id=-1,
        eos_id=1, unk_id=0, hard_vocab_limit=False, minloglevel=2, add_dummy_prefix=False,
    )  # fmt: skip
    own = SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=siglip.LENGTH)
    made = with_offsets(own)
    assert isinstance(made, OffsetTokenizer)
    for text in (CAPTION, "  caf\u00e9 dog's", "\u00bd \ufb01ne", "_a\u2581b"):
        assert made(text)["input_ids"] == own(text)["input_ids"]
    model = siglip.siglip_model()
    adapter = SiglipAdapter(model, tokenizer=own, image_processor=siglip.siglip_adapter().image_processor)
    found = explain(adapter, noise(), CAPTION, select=Selection(words=True))
    assert [entry.label for entry in found.entries] == [CAPTION, "A", "man", "in", "a", "red", "jacket"]
