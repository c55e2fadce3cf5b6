"""Attention times its gradient, in any stack on the path, against loops with a full backward pass per target."""

import numpy as np
import pytest

from grounding import explain
from grounding.core.errors import LayerError, OptionError
from tests.support import models
from tests.support.images import noise
from tests.support.tolerances import close
from tests.support.tutorials import flava, trocr
from tests.support.tutorials.clip import CAPTION, LAYERS, run_tutorial

IMAGE = noise(50, 40)
LINE = noise(90, 30)


def led(pair, head=None):
    """A (G)+ of one block, the mean over heads or one of them: (Q, S)."""
    attention, gradient = pair
    both = np.maximum(attention * gradient, 0)
    return both.mean(0) if head is None else both[head]


@pytest.mark.parametrize(("layer", "head"), [(None, None), (1, None), (-1, 2), (0, 0)])
def test_in_an_image_encoder(layer, head):
    options = {"grad_x_attention.layer": layer, "grad_x_attention.head": head}
    found = explain(models.clip_adapter(), IMAGE, CAPTION, methods="grad_x_attention", options=options)
    runs = run_tutorial(models.clip_adapter(), IMAGE, LAYERS[0])
    for i, (_, _, _, pairs) in enumerate(runs[: len(found.entries)]):
        assert close(found.map(i).raw.ravel(), led(pairs[-1 if layer is None else layer], head)[0, 1:])


@pytest.mark.parametrize(("layer", "head"), [(None, None), (0, 1)])
def test_at_the_cross_attention_of_a_decoder(layer, head):
    """The default stack of an encoder-decoder; `gradient_x_cross_attention` is the same there."""
    adapter = models.trocr_adapter()
    names = ["grad_x_attention", "gradient_x_cross_attention"]
    options = {f"{name}.head": head for name in names} | {"grad_x_attention.layer": layer}
    options |= {} if layer is None else {"gradient_x_cross_attention.layer": layer}
    found = explain(adapter, LINE, "red car", methods=names, select=trocr.TOKENS, options=options)
    for row, (_, _, _, pairs) in enumerate(trocr.tutorial(adapter, "red car", image=LINE)):
        expected = led(pairs["cross"][-1 if layer is None else layer], head)[row, 1:]
        for name in names:
            assert close(found.map(row, name).raw.ravel(), expected)


def test_in_the_encoder_behind_a_decoder():
    """The rows that enter the encoder are the rollout through the decoder: cross-attention of the token."""
    adapter = models.trocr_adapter()
    options = {"grad_x_attention.stack": "vision"}
    found = explain(adapter, LINE, "red car", methods="grad_x_attention", select=trocr.TOKENS, options=options)
    for row, (_, _, _, pairs) in enumerate(trocr.tutorial(adapter, "red car", image=LINE)):
        entering = pairs["cross"][-1][0].mean(0)[row]
        assert close(found.map(row).raw.ravel(), (entering @ led(pairs["vision"][-1]))[1:])


@pytest.mark.parametrize("kind", ["matching", "logit"])
@pytest.mark.parametrize("head", [None, 3])
def test_in_a_fusion_encoder(kind, head):
    """The default block is the last in which the text's rows have a gradient; `attention_gradcam` there is the same."""
    adapter = models.flava_adapter(kind=kind)
    names = ["grad_x_attention", "attention_gradcam"]
    options = {"grad_x_attention.head": head, "attention_gradcam.head": head}
    found = explain(adapter, IMAGE, flava.TEXT, methods=names, select=flava.entries(kind), options=options)
    layer = flava.FUSION["fusion:0"]
    live = {"logit": -1, "matching": -2}[kind]
    runs = flava.loop(adapter, kind, layer, IMAGE)
    count = len(adapter.tokenizer(flava.TEXT)["input_ids"])
    places = [*([] if kind == "logit" else [slice(1, count - 1)]), *(slice(t, t + 1) for t in range(1, count - 1))]
    for i, (run, place) in enumerate(zip(runs, places, strict=True)):
        for name, block in (("grad_x_attention", live), ("attention_gradcam", -2)):
            # The multimodal sequence: its CLS, the image's CLS, patches, text.
            weighted = led(run[3]["multimodal_model"][block], head)[2 + flava.PATCHES :]
            expected = weighted[place, 2 : 2 + flava.PATCHES].sum(0)
            assert close(found.map(i, name).raw.ravel(), expected)


@pytest.mark.parametrize("name", ["grad_x_attention", "attention_gradcam"])
def test_dead_rows_are_refused(name):
    """In the last block the matching head reads the CLS alone: no row of the text has a gradient."""
    adapter = models.flava_adapter(kind="matching")
    with pytest.raises(LayerError, match=rf"{name}: block -1 of the fusion stack is dead: .*; use layer=-2"):
        explain(adapter, IMAGE, flava.TEXT, methods=name, options={f"{name}.layer": -1})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"stack": "text"}, OptionError, r"no stack 'text' leads from .* \(there are: vision\)"),
        ({"layer": 3}, LayerError, "grad_x_attention.layer: 3 is not in -3 to 2"),
        ({"head": 4}, LayerError, "grad_x_attention.head: 4 is not in -4 to 3"),
    ],
)
def test_wrong_options_are_refused(options, error, words):
    asked = {f"grad_x_attention.{name}": value for name, value in options.items()}
    with pytest.raises(error, match=words):
        explain(models.clip_adapter(), IMAGE, CAPTION, methods="grad_x_attention", options=asked)


def test_one_block_of_relevance_is_the_same():
    adapter = models.clip_adapter()
    found = explain(adapter, IMAGE, CAPTION, methods=["gae", "grad_x_attention"], options={"gae.start_layer": -1})
    assert list(found.methods) == ["relevance", "grad_x_attention"]
    assert close(found.methods["grad_x_attention"].maps, found.methods["relevance"].maps)
