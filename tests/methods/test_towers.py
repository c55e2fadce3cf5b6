"""LeGrad and Grad-ECLIP against their oracles: CLIP, whose CLS is pooled, and an attention pooling head."""

import numpy as np
import pytest
import torch

from grounding import Selection, explain
from grounding.core.errors import LayerError, ModelError, OptionError
from grounding.core.text import Query
from grounding.engine.queries import prepare
from grounding.engine.signals import scores
from tests.support import models
from tests.support.images import noise
from tests.support.model_state import snapshot, unchanged
from tests.support.oracles import towers, vision
from tests.support.pooled import PooledAdapter
from tests.support.tiled import TiledAdapter
from tests.support.tolerances import ORACLE, TUTORIAL, close

TEXT = "a man in a red jacket"
IMAGES = [noise(70, 50, 1), noise(40, 90, 2)]
CAPTION = Selection(tokens=False)
LEFT_OUT = Selection(tokens=["man"])


def clip_case(image, detach=False, dtype=torch.float64, words=()):
    """A CLIP, the tower of its image, and the direction of a caption, less that of the caption without `words`."""
    adapter = models.clip_adapter(0)
    pixels = adapter.prepare_images([image]).tensors["pixel_values"]
    seed = vision.text_embedding(adapter.model, adapter.tokenizer, TEXT)
    if words:
        seed = seed - vision.text_embedding(adapter.model, adapter.tokenizer, TEXT, words)
    return models.clip_adapter(0, dtype), towers.Tower(adapter.model, pixels, detach), seed


def pooled_case(image, detach=False):
    adapter = PooledAdapter()
    pixels = adapter.prepare_images([image]).tensors["pixel_values"]
    ids = adapter.prepare_texts(adapter.prepare_images([image]), [[Query(TEXT)]]).texts[0].ids
    return adapter, towers.Tower(adapter.model, pixels, detach), adapter._embed(ids)


def siglip_case(image, detach=False):
    """The adapter of SigLIP; the direction of the caption as the adapter has it."""
    adapter = models.siglip_adapter()
    inputs = prepare(adapter, [image], [[TEXT]])
    seed = adapter.targets(inputs, [[inputs.texts[0].caption()]], "similarity").data["seeds"][0]
    return adapter, towers.Tower(adapter.model, inputs.images.tensors["pixel_values"], detach), seed


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, ORACLE), (torch.float32, TUTORIAL)])
@pytest.mark.parametrize("rule", ["none", "detach"])
@pytest.mark.parametrize(("options", "expected"), [
    ({}, {}),
    ({"pooling": "own"}, {"pooling": "cls"}),
    ({"start_layer": 1}, {"start": 1}),
    ({"start_layer": "-1", "pooling": "own"}, {"start": 2, "pooling": "cls"}),
])  # fmt: skip
def test_legrad_of_a_cls_token(options, expected, rule, dtype, bound):
    """Two images in one batch, two captions of the first: each map that of the oracle."""
    asked = {f"legrad.{name}": value for name, value in {**options, "norm_rule": rule}.items()}
    cases = [clip_case(image, rule == "detach", dtype) for image in IMAGES]
    texts = [[TEXT, "two dogs"], [TEXT]]
    found = explain(cases[0][0], IMAGES, texts, methods="legrad", select=CAPTION, options=asked)
    for (_, tower, seed), [own, *_] in zip(cases, found, strict=True):
        assert close(own[0].raw.ravel(), towers.legrad(tower, seed, **expected), bound)
    dogs = vision.text_embedding(models.clip_model(), models.tokenizer(), "two dogs")
    assert close(found[0][1][0].raw.ravel(), towers.legrad(cases[0][1], dogs, **expected), bound)


def test_legrad_of_a_difference_of_scores():
    """Of a token left out: the gradient of the difference, not the difference of two maps."""
    adapter, tower, seed = clip_case(IMAGES[0], words=[2])
    found = explain(adapter, IMAGES[0], TEXT, methods="legrad", select=LEFT_OUT)
    assert found.entries[1].label == "man"
    assert close(found.map(1).raw.ravel(), towers.legrad(tower, seed))


@pytest.mark.parametrize("rule", ["none", "detach"])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("case", [pooled_case, siglip_case])
def test_legrad_of_an_attention_pooling_head(case, start, rule):
    options = {"legrad.start_layer": start, "legrad.norm_rule": rule}
    cases = [case(image, rule == "detach") for image in IMAGES]
    found = explain(cases[0][0], IMAGES, TEXT, methods="legrad", select=CAPTION, options=options)
    for (_, tower, seed), own in zip(cases, found, strict=True):
        assert close(own[0].raw.ravel(), towers.legrad_pool(tower, seed, start=start))


@pytest.mark.parametrize("kind", ["vit", "deit", "deit with teacher", "dinov2"])
def test_legrad_of_a_classifier_is_the_slope_of_its_class(kind):
    """The last block alone, as the model pools it: positive gradients of the class's own logit."""
    adapter = models.classifier_adapter(kind)
    options = {"legrad.pooling": "own", "legrad.start_layer": -1}
    found = explain(adapter, IMAGES[0], target=2, methods="legrad", options=options)
    pixels = adapter.prepare_images(IMAGES[:1]).tensors["pixel_values"]
    kept = []
    path = adapter.structure("class").stack("vision").attention[-1]
    adapter.model.set_attn_implementation("textbook")
    vision.KEPT.clear()
    logit = adapter.model(pixel_values=pixels).logits[0, 2]
    kept = vision.KEPT[-1]
    [gradient] = torch.autograd.grad(logit, kept)
    assert path
    expected = towers.positive_mean(gradient[0].numpy())[adapter.structure("class").prefix :]
    assert close(found[0].raw.ravel(), expected)


def test_legrad_of_the_length_of_an_embedding_reads_no_text():
    found = explain(models.clip_adapter(), IMAGES, None, methods="legrad", target="norm")
    assert all(one.methods["legrad"].shared and one[0].raw.any() for one in found)


@pytest.mark.parametrize("rule", ["none", "detach"])
@pytest.mark.parametrize("form", ["model", "heads", "plain"])
@pytest.mark.parametrize("case", [clip_case, pooled_case, siglip_case])
def test_grad_eclip(case, form, rule):
    cases = [case(image, rule == "detach") for image in IMAGES]
    options = {"grad_eclip.form": form, "grad_eclip.norm_rule": rule}
    found = explain(cases[0][0], IMAGES, TEXT, methods="grad_eclip", select=CAPTION, options=options)
    for (_, tower, seed), own in zip(cases, found, strict=True):
        assert close(own[0].raw.ravel(), towers.grad_eclip_of(tower, seed, form))


def test_grad_eclip_of_a_token_left_out_and_in_single_precision():
    adapter, tower, seed = clip_case(IMAGES[0], dtype=torch.float32, words=[2])
    found = explain(adapter, IMAGES[0], TEXT, methods="grad_eclip", select=LEFT_OUT)
    assert close(found.map(1).raw.ravel(), towers.grad_eclip_of(tower, seed), TUTORIAL)


def test_grad_eclip_where_a_module_shows_its_linear_maps_alone():
    """FLAVA's attention calls no attention function: query and key are the outputs of its linear maps."""
    adapter = models.flava_adapter()
    block = adapter.model.flava.image_model.encoder.layer[-1].attention.attention
    kept = {}
    for name in ("query", "key", "value"):
        getattr(block, name).register_forward_hook(lambda m, a, out, n=name: kept.update({n: out}))
    block.register_forward_hook(lambda m, a, out: kept.update(joined=out[0]))
    pixels = adapter.prepare_images(IMAGES[:1])
    inputs = prepare(adapter, IMAGES[:1], [[TEXT]], "similarity")
    targets = adapter.targets(inputs, [[inputs.texts[0].caption()]], "similarity")
    assert pixels
    [gradient] = torch.autograd.grad(adapter.forward(inputs, targets).sum(), kept["joined"])
    parts = {name: tensor[0].detach().numpy() for name, tensor in kept.items()}
    expected = towers.grad_eclip(gradient[0, 0].numpy(), parts["value"][1:], parts["query"][0], parts["key"][1:])
    found = explain(models.flava_adapter(), IMAGES[0], TEXT, methods="grad_eclip", select=CAPTION)
    assert close(found[0].raw.ravel(), expected)


def test_both_leave_the_model_as_it_was():
    adapter = models.clip_adapter()
    before = snapshot(adapter.model)
    explain(adapter, IMAGES[0], TEXT, methods=["legrad", "grad_eclip"])
    assert unchanged(before, snapshot(adapter.model))
    assert not any("forward" in vars(module) for module in adapter.model.modules())


def test_with_all_other_methods_they_give_the_same_maps():
    """Passes with and without cuts, with and without the rule, in one request."""
    adapter = models.clip_adapter()
    names = ["gradcam", "relevance", "legrad", "grad_eclip", "gradcam_ln"]
    together = explain(adapter, IMAGES, TEXT, methods=names)
    for name in names:
        alone = explain(adapter, IMAGES, TEXT, methods=[name])
        for one, other in zip(together, alone, strict=True):
            assert np.array_equal(one.methods[name].maps, other.methods[name].maps)
            assert [e.score for e in one.entries] == pytest.approx([e.score for e in other.entries], abs=1e-12)


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (models.clip_adapter, {"legrad.start_layer": 3}, LayerError, "legrad.start_layer: 3 is not in -3 to 2"),
        (models.clip_adapter, {"legrad.pooling": "max"}, OptionError, "'max' is none of mean, own"),
        (models.trocr_adapter, {}, OptionError, "'legrad' reads pooled vision attention, which .* does not have"),
        (lambda: models.flava_adapter(kind="matching"), {}, OptionError, "'legrad' reads pooled vision attention"),
        (lambda: models.classifier_adapter("resnet"), {}, OptionError, "'legrad' reads vision attention"),
    ],
)
def test_legrad_refused(make, options, error, words):
    adapter = make()
    text = None if "resnet" in adapter.info.type else TEXT
    with pytest.raises(error, match=words):
        explain(adapter, IMAGES[0], text, methods="legrad", options=options)


def test_legrad_of_tiles_is_refused():
    """A block's mean over tokens is then that of a tile."""
    with pytest.raises(OptionError, match=r"'legrad' reads one matrix of attention per image, .* cut into tiles"):
        explain(TiledAdapter(), noise(90, 70), "two dogs", methods="legrad")


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (models.clip_adapter, {"grad_eclip.form": "published"}, "'published' is none of model, heads, plain"),
        (models.mean_adapter, {}, "'grad_eclip' reads one pooling token's attention, which mean does not have"),
        (models.trocr_adapter, {}, "'grad_eclip' reads one pooling token's attention"),
    ],
)
def test_grad_eclip_refused(make, options, words):
    with pytest.raises(OptionError, match=words):
        explain(make(), IMAGES[0], TEXT, methods="grad_eclip", options=options)


def test_legrad_is_refused_where_earlier_blocks_are_read_too():
    """The output of one block then has no score of its own."""
    adapter = models.mean_adapter()
    model = adapter.model
    kept = []
    model.blocks[0].register_forward_hook(lambda m, a, out: kept.append(out[0]))
    plain = model.forward

    def both(pixels):
        kept.clear()
        return plain(pixels) + kept[0].mean(1)

    adapter.encode_images = lambda images: both(images.tensors["pixel_values"])
    with pytest.raises(ModelError, match="reads more than the output of the last block"):
        explain(adapter, IMAGES[0], TEXT, methods="legrad")


def test_scores_are_those_of_the_model():
    adapter = models.clip_adapter()
    inputs = prepare(adapter, IMAGES[:1], [[TEXT]])
    targets = adapter.targets(inputs, [[inputs.texts[0].caption()]], "similarity")
    found = explain(adapter, IMAGES[0], TEXT, methods="legrad", select=CAPTION)
    assert found.entries[0].score == pytest.approx(float(scores(adapter, inputs, targets)[0]), abs=1e-12)
