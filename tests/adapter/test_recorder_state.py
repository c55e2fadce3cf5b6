"""The state of the user's model is restored: after success, after an error anywhere, after Ctrl-C."""

import gc
import types

import numpy as np
import pytest
import torch

from grounding import METHODS, explain
from grounding.core.errors import ModelError, NumericError
from grounding.engine.layers import list_layers
from grounding.engine.plan import available
from grounding.methods.base import Method
from tests.support import models
from tests.support.contract import structure
from tests.support.images import noise
from tests.support.model_state import disturb, snapshot, unchanged

CAPTION = "a man in a red jacket"
FEW_MASKS = {"rise.masks": 10}
BROKEN = None


class Break(torch.autograd.Function):
    """Identity whose backward fails."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


def break_forward(model, error):
    def fail(module, args, output):
        raise error

    return last_leaf(model).register_forward_hook(fail)


def break_backward(model, error):
    # Nothing but the pooling follows the last feature map.
    module = model.vision_model.pooler if [*convolutional_blocks(model)] else last_leaf(model)
    return module.register_forward_hook(
        lambda module, args, out: Break.apply(out if torch.is_tensor(out) else out[0], error)
    )


def convolutional_blocks(model):
    """The modules of ALIGN's image encoder."""
    return model.vision_model.encoder.modules() if model.__class__.__name__ == "AlignModel" else ()


def last_leaf(model):
    """A module that runs after every recorded layer: the last linear layer of the last block or of a class head, in a
    convolutional image encoder its last convolution."""
    if convolutions := [m for m in convolutional_blocks(model) if isinstance(m, torch.nn.Conv2d)]:
        return convolutions[-1]
    heads = ("classifier", "cls_classifier", "head")
    if head := next((h for name, h in model.named_children() if name in heads), None):
        return [m for m in head.modules() if isinstance(m, torch.nn.Linear)][-1]
    image = "image_model.encoder.layer"
    paths = ("vision_model.encoder.layers", "decoder.model.decoder.layers", f"flava.{image}", image, "blocks")
    blocks = next(dict(model.named_modules())[path] for path in paths if path in dict(model.named_modules()))
    return [m for m in blocks[-1].modules() if isinstance(m, torch.nn.Linear)][-1]


@pytest.mark.parametrize(
    ("breaker", "error"),
    [
        (None, None),
        (break_forward, RuntimeError("forward failed")),
        (break_forward, KeyboardInterrupt()),
        (break_backward, RuntimeError("backward failed")),
        (break_backward, KeyboardInterrupt()),
    ],
)
def test_model_is_as_before(any_adapter, breaker, error):
    explain(any_adapter, noise(50, 40), CAPTION)  # warm-up: transformers installs capture hooks for good
    disturb(any_adapter.model)
    handle = breaker(any_adapter.model, error) if breaker else None
    before = snapshot(any_adapter.model)
    methods = available(structure(any_adapter))
    if error is None:
        explain(any_adapter, noise(50, 40), CAPTION, methods=methods, options=FEW_MASKS)
        list_layers(any_adapter, noise(50, 40), CAPTION)
    else:
        with pytest.raises(type(error)):
            explain(any_adapter, noise(50, 40), CAPTION, methods=methods, options=FEW_MASKS)
    assert unchanged(before, snapshot(any_adapter.model))
    if handle:
        handle.remove()


@pytest.mark.parametrize("error", [RuntimeError("a method failed"), KeyboardInterrupt()])
def test_an_error_in_a_method_leaves_no_trace_either(any_adapter, error, monkeypatch):
    def fail(trace):
        raise error

    explain(any_adapter, noise(50, 40), CAPTION)
    broken = Method("broken", frozenset({"patch_gradient", "attention"}), True, fail)
    monkeypatch.setattr("tests.adapter.test_recorder_state.BROKEN", broken)
    monkeypatch.setitem(METHODS._table, "broken", "tests.adapter.test_recorder_state:BROKEN")
    before = snapshot(any_adapter.model)
    with pytest.raises(type(error)) as caught:
        explain(any_adapter, noise(50, 40), CAPTION, methods=["broken"])
    assert unchanged(before, snapshot(any_adapter.model)), caught


def test_snapshot_notices_what_it_should(any_adapter):
    """The comparison detects each kind of change."""
    model = any_adapter.model
    before = snapshot(model)
    assert unchanged(before, snapshot(model))
    parameter = next(model.parameters())
    config = getattr(model, "config", types.SimpleNamespace(_attn_implementation=None))
    other = "sdpa" if config._attn_implementation == "eager" else "eager"
    changes = [
        (lambda: parameter.requires_grad_(False), lambda: parameter.requires_grad_(True)),
        (lambda: setattr(parameter, "grad", torch.ones_like(parameter)), lambda: setattr(parameter, "grad", None)),
        (lambda: model.train(), lambda: model.eval()),
        *([(lambda: setattr(config, "_attn_implementation", other), None)] if hasattr(model, "config") else []),
    ]
    for change, undo in changes:
        change()
        assert not unchanged(before, snapshot(model))
        if undo:
            undo()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_under_the_callers_gradient_mode(any_adapter, context):
    plain = explain(any_adapter, noise(50, 40), CAPTION)
    with context():
        found = explain(any_adapter, noise(50, 40), CAPTION)
    for key, column in plain.methods.items():
        assert np.array_equal(column.maps, found.methods[key].maps)


def test_train_mode_and_frozen_parameters_change_no_number(any_adapter):
    plain = explain(any_adapter, noise(50, 40), CAPTION)
    any_adapter.model.train()
    any_adapter.model.requires_grad_(False)
    found = explain(any_adapter, noise(50, 40), CAPTION)
    assert [e.score for e in found.entries] == [e.score for e in plain.entries]
    assert all(np.array_equal(c.maps, found.methods[k].maps) for k, c in plain.methods.items())


def test_same_call_twice_gives_identical_arrays(any_adapter):
    first, second = (
        explain(any_adapter, noise(50, 40), CAPTION, methods=available(structure(any_adapter)), options=FEW_MASKS)
        for _ in range(2)
    )
    for key, column in first.methods.items():
        assert np.array_equal(column.maps, second.methods[key].maps)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_an_error_and_never_a_map(any_adapter, value):
    weight = last_leaf(any_adapter.model).weight
    with torch.no_grad():
        weight[0, 0] = value
    with pytest.raises(NumericError, match="NaN or Inf"):
        explain(any_adapter, noise(50, 40), CAPTION)


def test_memory_stays_flat(clip):
    """500 calls leak no tensor."""
    image = noise(40, 30)

    def live():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for _ in range(3):
        explain(clip, image, "red car")
    before = live()
    for _ in range(500):
        explain(clip, image, "red car")
    assert live() <= before


def test_precision_of_the_caller_does_not_reach_the_pass():
    adapter = models.clip_adapter(dtype=torch.float32)
    plain = explain(adapter, noise(40, 40), "red car", methods=["gradcam", "relevance"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = explain(adapter, noise(40, 40), "red car", methods=["gradcam", "relevance"])
    assert all(np.array_equal(found.methods[key].maps, plain.methods[key].maps) for key in plain.methods)


def test_a_model_made_without_gradients_is_refused_and_left_alone():
    with torch.inference_mode():
        adapter = models.clip_adapter(dtype=torch.float32)
    before = [parameter.requires_grad for parameter in adapter.model.parameters()]
    with pytest.raises(ModelError, match=r"was made under torch.inference_mode\(\)"):
        explain(adapter, noise(40, 40), "red car")
    assert [parameter.requires_grad for parameter in adapter.model.parameters()] == before
