"""A model unlike those that the contract grew from: packed patches, windows, merged cells, tokens inside a sequence."""

import numpy as np
import pytest
import torch
from PIL import Image

import grounding
from grounding.adapter.patch_tokens import fold
from grounding.adapter.recorder import Recorder
from grounding.core.errors import OptionError
from grounding.core.text import Generate, Query
from grounding.engine.layers import list_layers
from grounding.engine.queries import prepare
from grounding.engine.signals import attentions, pooled_gradient
from tests.support.images import noise
from tests.support.models import tokenizer
from tests.support.qwen import LANGUAGE, MERGER, QwenAdapter, qwen_adapter

SIZES = ((60, 40), (90, 20), (24, 70), (48, 48))
METHODS = ["gradcam", "hirescam", "rollout", "relevance", "grad_x_attention", "attention"]


@pytest.fixture(scope="module")
def adapter() -> QwenAdapter:
    return qwen_adapter(tokenizer())


@pytest.fixture(scope="module")
def images():
    return [noise(*size, seed=i) for i, size in enumerate(SIZES)]


def test_the_score_is_the_models_own(adapter, images):
    inputs = prepare(adapter, images[:2], [["red car"], ["two dogs", "a man"]])
    targets = adapter.targets(inputs, [text.tokens() for text in inputs.texts], "logit")
    with torch.no_grad():
        found = adapter.forward(inputs, targets)
    for t, b in enumerate(inputs.text_image):
        one, length = inputs.images.select([b]), int(inputs.tensors["attention_mask"][t].sum())
        ids = inputs.tensors["input_ids"][t : t + 1, :length]
        kinds = (ids == adapter.model.config.image_token_id).int()
        with torch.no_grad():
            logits = adapter.model(input_ids=ids, mm_token_type_ids=kinds, **one.tensors).logits[0]
        begin = int(inputs.tensors["begin"][t])
        mine = [k for k in range(len(targets)) if int(targets.text[k]) == t]
        expected = [logits[begin + i, token] for i, token in enumerate(inputs.texts[t].ids)]
        assert torch.allclose(found[mine], torch.stack(expected), atol=1e-9)


def test_a_batch_of_different_grids_equals_singles(adapter, images):
    texts = ["red car", "two dogs", "a man in a red jacket", "red bus"]
    together = grounding.explain(adapter, images, texts, methods=METHODS)
    assert len({one.methods["gradcam"].maps.shape[1:] for one in together}) == len(SIZES)
    for image, text, batched in zip(images, texts, together, strict=True):
        single = grounding.explain(adapter, image, text, methods=METHODS)
        for key in METHODS:
            own, other = batched.methods[key].maps, single.methods[key].maps
            assert own.any()
            assert np.abs(own - other).max() < 1e-5 * np.abs(other).max(), key


def test_gradcam_at_the_merger_is_a_plain_loop(adapter, images):
    explanation = grounding.explain(adapter, images[0], "red car", methods="gradcam")
    inputs = prepare(adapter, images[:1], [["red car"]])
    kept = []
    merger = adapter.model.model.visual.merger
    handle = merger.register_forward_hook(lambda _m, _a, out: kept.append(out))
    targets = adapter.targets(inputs, [[inputs.texts[0].caption()]], "logit")
    score = adapter.forward(inputs, targets)[0]
    handle.remove()
    [gradient] = torch.autograd.grad(score, kept[0])
    [place] = adapter.patch_tokens(MERGER, inputs, tuple(kept[0].shape))
    expected = (kept[0] @ gradient.mean(0)).detach().numpy()[place.index]
    assert np.allclose(explanation.methods["gradcam"].maps[0], expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("layer", [MERGER, "model.visual.blocks.3", "model.visual.blocks.0", f"{LANGUAGE}.layers.1"])
def test_a_changed_place_changes_its_own_cells_most(adapter, layer):
    """Cells are where the image is: a white square is found in window order, merged cells and the sequence."""
    size = (64, 48)
    for x, y in ((4, 4), (52, 8), (28, 36), (44, 24)):
        pictures = []
        for colour in (0, 255):
            array = np.zeros((size[1], size[0], 3), np.uint8)
            array[y : y + 8, x : x + 8] = colour
            pictures.append(Image.fromarray(array))
        inputs = prepare(adapter, pictures, [["red car"]] * 2)
        with Recorder(adapter.model, {layer: False}) as recorder:
            adapter.forward(inputs, adapter.targets(inputs, [[text.caption()] for text in inputs.texts], "logit"))
        output = recorder.outputs[layer]
        black, white = fold(output, adapter.patch_tokens(layer, inputs, tuple(output.shape)))
        change = (white - black).norm(dim=-1)
        row, column = np.unravel_index(int(change.argmax()), change.shape)
        across, down = size[0] / change.shape[1], size[1] / change.shape[0]
        assert (column + 0.5) * across == pytest.approx(x + 4, abs=across)
        assert (row + 0.5) * down == pytest.approx(y + 4, abs=down)


def test_grad_x_attention_is_a_plain_loop(adapter, images):
    explanation = grounding.explain(
        adapter, images[1], "red car", methods="grad_x_attention", options={"grad_x_attention.layer": 1}
    )
    inputs = prepare(adapter, [images[1]], [["red car"]])
    [place] = adapter.patch_tokens(f"{LANGUAGE}.layers.0", inputs, (1, inputs.tensors["input_ids"].shape[1], 32))
    path = f"{LANGUAGE}.layers.1.self_attn"
    for entry, span in enumerate([inputs.texts[0].caption(), *inputs.texts[0].tokens()]):
        with Recorder(adapter.model, attention={path: True}) as recorder:
            score = adapter.forward(inputs, adapter.targets(inputs, [[span]], "logit"))[0]
            [gradient] = torch.autograd.grad(score, recorder.weights[path])
        rows = [int(inputs.tensors["begin"][0]) + i for i in span.positions]
        product = (recorder.weights[path] * gradient).clamp(min=0).mean(1)[0].detach()
        expected = product[rows].sum(0).numpy()[place.index]
        assert np.allclose(explanation.methods["grad_x_attention"].maps[entry], expected, rtol=1e-5, atol=1e-9)


def test_last_block_tokens_share_a_backward_pass(adapter, images):
    texts = "a man in a red jacket"
    one = grounding.explain(adapter, images[0], texts, methods="grad_x_attention")
    inputs = prepare(adapter, images[:1], [[texts]])
    last = attentions(adapter, inputs, "language")[-1]
    assert torch.allclose(last.sum(-1), torch.ones(()).double())
    assert (np.ptp(one.methods["grad_x_attention"].maps, axis=0) > 0).any()


def test_pooled_gradient_sums_over_own_patches(adapter, images):
    inputs = prepare(adapter, images[:2], [["red car"], ["two dogs"]])
    targets = adapter.targets(inputs, [[text.caption()] for text in inputs.texts], "logit")
    slow = pooled_gradient(adapter, inputs, targets, MERGER)
    with Recorder(adapter.model, {MERGER: True}) as recorder:
        total = adapter.forward(inputs, targets).sum()
        [gradient] = torch.autograd.grad(total, recorder.outputs[MERGER])
    places = adapter.patch_tokens(MERGER, inputs, tuple(gradient.shape))
    expected = torch.stack([fold(gradient, [place]).sum((0, 1, 2)) for place in places])
    assert torch.allclose(slow, expected, atol=1e-9)


def test_generated_equals_forced(adapter, images):
    generated = grounding.explain(adapter, images[0], Generate(max_length=4), methods="gradcam")
    inputs = prepare(adapter, images[:1], [[Generate(max_length=4)]])
    targets = adapter.targets(inputs, [inputs.texts[0].tokens()], "logit")
    ids = [span.token_id for span in targets.spans]
    with torch.no_grad():
        scores = adapter.forward(inputs, targets)
    assert [entry.token_id for entry in generated.entries[1:]] == ids
    assert np.allclose([entry.score for entry in generated.entries[1:]], scores, atol=1e-6)


def test_a_prompt_changes_the_score_and_is_not_explained(adapter, images):
    plain = grounding.explain(adapter, images[0], "red car", methods="gradcam")
    asked = grounding.explain(adapter, images[0], Query("red car", prompt="two dogs playing"), methods="gradcam")
    assert asked.caption == plain.caption == "red car"
    assert [entry.label for entry in asked.entries] == [entry.label for entry in plain.entries]
    assert asked.entries[0].score != pytest.approx(plain.entries[0].score, abs=1e-6)


def test_layers_are_listed_and_windows_are_refused(adapter, images):
    layers = {layer.path: layer for layer in list_layers(adapter, images[0])}
    assert layers[MERGER].default
    assert layers[MERGER].live
    assert layers["model.visual.blocks.3"].live
    with pytest.raises(OptionError, match="reads cross attention, which qwen2_5_vl does not have"):
        grounding.explain(adapter, images[0], "red car", methods="cross_attention")
