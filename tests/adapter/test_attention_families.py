"""Attention recorded in tiny models of many families: scores, weights and gradients of the model itself."""

import importlib

import pytest
import torch

from grounding.adapter import attention_interface
from grounding.adapter.attention import record_attention
from grounding.adapter.recorder import Recorder, find_module
from grounding.core.errors import ModelError
from tests.support.attention_models import FAMILIES, qwen2_5_vision, record
from tests.support.model_state import disturb, snapshot, unchanged
from tests.support.tolerances import SINGLE, close

# The eager functions of these compute the softmax in float32, also of a float64 model.
EAGER_IN_SINGLE = {"gemma2", "git"}


def recorded(case, gradient=True):
    """Scores, weights and gradients of the sum of scores, by the recorder."""
    with Recorder(case.model, attention=dict.fromkeys(case.attention, gradient)) as recorder:
        scores = case.call()
        recorder.check()
        weights = [recorder.weights[path] for path in case.attention]
        gradients = torch.autograd.grad(scores.sum(), weights) if gradient else []
    return scores.detach(), [w.detach() for w in weights], gradients


def on_one_graph(case):
    """The same on one graph from the first weights on: the gradients are those of zeros added to all weights."""
    modules = {find_module(case.model, path): path for path in case.attention}
    weights, zeros = {}, {}

    def add(module, found, *_):
        if module not in modules:
            return found
        zeros[modules[module]] = torch.zeros_like(found, requires_grad=True)
        weights[modules[module]] = found.detach()
        return found + zeros[modules[module]]

    case.model.requires_grad_(False)
    with record_attention(case.model, dict.fromkeys(modules, True), add, lambda _module, x: x):
        scores = case.call()
    order = [zeros[path] for path in case.attention]
    return [weights[path] for path in case.attention], torch.autograd.grad(scores.sum(), order)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gradient", [True, False])
def test_scores_are_those_of_the_model(family, dtype, gradient):
    case = FAMILIES[family](dtype)
    with torch.no_grad():
        plain = case.call()
    scores, weights, gradients = recorded(case, gradient)
    exact = dtype == torch.float64 and family not in EAGER_IN_SINGLE
    assert close(scores, plain, *([] if exact else [SINGLE]))
    for path, found in zip(case.attention, weights, strict=True):
        assert found.ndim == 4, path
        sums = found.sum(-1)
        if case.rows_of_one:
            assert close(sums, torch.ones_like(sums), *([] if exact else [SINGLE]))
        else:
            assert ((sums > 0) & (sums < 0.999)).all(), "an attention sink takes a part"
    assert all(gradient.any() for gradient in gradients)


def test_gradients_are_those_of_one_graph(family):
    """The leaf at the first weights, and tensors on its graph later, have the gradients of the uncut pass."""
    case = FAMILIES[family]()
    _, weights, gradients = recorded(case)
    if family == "qwen2_5_vision":
        return  # packed sequences: below, by an eager function of the family's own
    expected = on_one_graph(case)
    for found, slow in zip((*weights, *gradients), (*expected[0], *expected[1]), strict=True):
        assert close(found, slow)


@pytest.mark.parametrize("name", ["siglip", "pix2struct", "gemma2", "gpt_oss"])
def test_weights_are_those_of_the_eager_function(name, monkeypatch):
    """The family's own eager function returns the same weights, and its output has the same gradients."""
    case = FAMILIES[name](implementation="eager")
    slow = own_eager(case, monkeypatch)
    _, weights, gradients = recorded(FAMILIES[name]())
    tested = 0
    for path, found, gradient in zip(case.attention, weights, gradients, strict=True):
        if path in slow:
            tested += 1
            assert close(found, slow[path][0], SINGLE)
            assert close(gradient, slow[path][1], SINGLE)
    assert tested >= 2


def own_eager(case, monkeypatch):
    """Weights and gradients with the family's eager function, whose softmax is patched: path -> both.

    For one call per module: zeros are added to the result of the softmax, by `torch.nn.functional.dropout`.
    """
    modules = {find_module(case.model, path): path for path in case.attention}
    active, found, zeros = [], {}, {}

    def dropout(x, p=0.5, training=True, inplace=False):
        path = active[-1] if active else None
        if path is None or x.ndim != 4:
            return x
        zeros[path], found[path] = torch.zeros_like(x, requires_grad=True), x.detach()
        return x + zeros[path]

    handles = []
    for module, path in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _module, _args, p=path: active.append(p)))
        handles.append(module.register_forward_hook(lambda _module, _args, _out: active.clear()))
    monkeypatch.setattr("torch.nn.functional.dropout", dropout)
    case.model.requires_grad_(False)
    scores = case.call()
    monkeypatch.undo()
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(scores.sum(), list(zeros.values()))
    return {path: (found[path], gradient) for path, gradient in zip(zeros, gradients, strict=True)}


def blocks_of_eager(case, monkeypatch):
    """Block-diagonal weights and gradients with an eager function that adds zeros of its own to each call's weights."""
    modules = {find_module(case.model, path): path for path in case.attention}
    calls = {path: [] for path in case.attention}

    def eager(module, query, key, value, attention_mask, scaling, **options):
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        calls[modules[module]].append((weights.detach(), torch.zeros_like(weights, requires_grad=True)))
        return ((weights + calls[modules[module]][-1][1]) @ value).transpose(1, 2), None

    file = importlib.import_module(type(case.model).__module__)
    monkeypatch.setattr(file, "eager_attention_forward", eager)
    case.model.requires_grad_(False)
    case.call().sum().backward()
    monkeypatch.undo()
    assembled = []
    for pairs in calls.values():
        each = [[torch.block_diag(*(x[0, h] for x in part)) for h in range(4)] for part in zip(*pairs, strict=True)]
        slopes = [torch.block_diag(*(zero.grad[0, h] for _, zero in pairs)) for h in range(4)]
        assembled.append((torch.stack(each[0])[None].detach(), torch.stack(slopes)[None], len(pairs)))
    return assembled


@pytest.mark.parametrize("images", [((1, 4, 6), (1, 4, 4)), ((1, 6, 6),)])
def test_packed_sequences_give_one_block_diagonal_tensor(images, monkeypatch):
    """Qwen2.5-VL: one call for each window (of unequal sizes), or for each image."""
    scores, weights, gradients = recorded(qwen2_5_vision(images=images))
    case = qwen2_5_vision(images=images, implementation="eager")
    with torch.no_grad():
        assert close(scores, case.call(), SINGLE)
    slow = blocks_of_eager(case, monkeypatch)
    assert [calls for *_, calls in slow] == ([3, 2] if len(images) == 2 else [4, 1])
    for found, gradient, (expected, slope, _) in zip(weights, gradients, slow, strict=True):
        assert found.shape == (1, 4, len(found[0, 0]), len(found[0, 0]))
        assert close(found, expected)
        assert close(gradient, slope)


@pytest.mark.parametrize("boundaries", [[0, 16, 24, 32, 40], [0, 16, 40], [0, 20, 40]])  # true: 0, 24, 40
def test_calls_that_are_not_the_packed_sequences_are_refused(boundaries, monkeypatch):
    case = qwen2_5_vision()

    class Wrong(attention_interface._Packed):
        def begin(self, module, args, keywords):
            super().begin(module, args, keywords)
            self.boundaries = boundaries

    monkeypatch.setattr(attention_interface, "_Packed", Wrong)
    before = snapshot(case.model)
    with pytest.raises(ModelError, match=r"calls seen that are not the \d packed sequences of its input"):
        record(case.model, {"blocks.1.attn": True}, case.call)
    assert unchanged(before, snapshot(case.model))


class BreakError(Exception):
    """An error of the user's model."""


@pytest.mark.parametrize("error", [None, BreakError(), KeyboardInterrupt()])
def test_model_is_as_before(family, error):
    case = FAMILIES[family]()
    disturb(case.model)
    last = find_module(case.model, case.attention[-1])

    def fail(*_):
        if error is not None:
            raise error

    hook = last.register_forward_hook(fail)
    before = snapshot(case.model), [sorted(vars(m)) for m in case.model.modules()]
    if error is None:
        recorded(case)
    else:
        with pytest.raises(type(error)):
            recorded(case)
    after = snapshot(case.model), [sorted(vars(m)) for m in case.model.modules()]
    assert unchanged(before[0], after[0])
    assert before[1] == after[1]
    hook.remove()
