"""The adapter contract, over every architecture of the table and one of a third party."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import adapters
from adapters import ADAPTERS
from grounding import explain
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.errors import LayerError, ModelError, TargetError, TextError
from grounding.engine.layers import list_layers
from grounding.engine.passes import run_passes
from grounding.engine.plan import available, plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request
from grounding.engine.signals import activations, attentions, scores
from tests.support import models
from tests.support.contract import default_layer, grid, shortcut, structure
from tests.support.images import noise
from tests.support.tolerances import SLOPE, close

CAPTION = "a man in a red jacket"


def prepared(adapter, captions=(CAPTION,)):
    inputs = prepare(adapter, [noise(90, 60)], [list(captions)])
    spans = [[tokens.caption(), *tokens.tokens()] for tokens in inputs.texts]
    return inputs, adapter.targets(inputs, spans)


def test_every_architecture_in_the_table_is_tested():
    assert set(ADAPTERS) <= set(models.FACTORIES)


def test_every_adapter_in_the_folder_is_in_the_table():
    """Fails while the line of an adapter is missing in the table."""
    targets = {ADAPTERS.target(name) for name in ADAPTERS}
    found = []
    for path in Path(adapters.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(b, ast.Name) and b.id in ("Adapter", "ClassAdapter") for b in node.bases
            ):
                module = ".".join(path.relative_to(Path(adapters.__file__).parents[1]).with_suffix("").parts)
                assert f"{module}:{node.name}" in targets
                found.append(module)
    assert len(found) >= 5, found


def test_scores_equal_the_engines(any_adapter):
    inputs, targets = prepared(any_adapter)
    found = explain(any_adapter, noise(90, 60), CAPTION)
    assert scores(any_adapter, inputs, targets).tolist() == pytest.approx([e.score for e in found.entries])


def test_activations_and_attentions_are_uniform(any_adapter):
    inputs, _ = prepared(any_adapter)
    rows, columns = grid(inputs)
    assert activations(any_adapter, inputs).shape[:3] == (1, rows, columns)
    if not structure(any_adapter).attention("vision"):
        with pytest.raises(ModelError, match=r"no attention of .* can be recorded: it "):
            attentions(any_adapter, inputs)
        return
    found = attentions(any_adapter, inputs)
    assert len(found) == len(structure(any_adapter).stacks["vision"].blocks)
    tokens = structure(any_adapter).prefix + rows * columns
    for weights in found:
        assert weights.shape[2:] == (tokens, tokens)
        assert weights.sum(-1).numpy() == pytest.approx(1)


def test_shift_gradient_equals_score_from(any_adapter):
    """The pooled gradient of the engine equals the gradient of `score_from`, which adds a vector to all patches."""
    inputs, targets = prepared(any_adapter)
    for layer in (None, "0", "-1.in" if structure(any_adapter).stacks["vision"].inputs else "-1"):
        layer = structure(any_adapter).find_layer(any_adapter.model, layer)
        plan = plan_methods(any_adapter, Request(["gradcam"], layers=[layer]))
        shift = torch.zeros(len(targets), activations(any_adapter, inputs, layer).shape[-1], dtype=torch.float64)
        shift.requires_grad_(True)
        scores = any_adapter.score_from(layer, inputs, targets, shift)
        (expected,) = torch.autograd.grad(scores.sum(), shift)
        found = torch.cat(
            [
                chunk.trace.at(layer, frozenset({"shift"})).shift()
                for chunk in run_passes(any_adapter, inputs, targets, plan)
            ]
        )
        assert close(found, expected)


@pytest.mark.parametrize("rule", [None, "layernorm"])
def test_shortcuts_equal_the_general_path(any_adapter, rule):
    """Scores and pooled gradients at layers with a shortcut, for several images and texts, equal the general path."""
    texts = [["a man in a red jacket", "two dogs"], ["red car"]]
    inputs = prepare(any_adapter, [noise(90, 60), noise(50, 70, 3)], texts)
    targets = any_adapter.targets(inputs, [[t.caption(), *t.tokens()] for t in inputs.texts])
    for layer, paths in shortcut(any_adapter).items():
        with Recorder(any_adapter.model, dict.fromkeys([layer, *paths], False)) as recorder:
            plain = any_adapter.forward(inputs, targets)
        for outputs in (None, recorder.outputs):
            width = any_adapter.to_grid(recorder.outputs[layer], grid(inputs), layer).shape[-1]
            shift = torch.zeros(len(targets), width, dtype=torch.float64, requires_grad=True)
            with torch.enable_grad():
                scores = any_adapter.score_from(layer, inputs, targets, shift, outputs, rule)
            assert close(scores.detach(), plain)
            if outputs is None:
                [slow] = torch.autograd.grad(scores.sum(), shift)
        assert close(any_adapter.shifts(layer, inputs, targets, recorder.outputs, rule), slow)


def test_one_forward_pass_for_all_methods(any_adapter, image):
    counted = []
    first = next(m for m in any_adapter.model.modules() if isinstance(m, torch.nn.Conv2d))
    handle = first.register_forward_hook(lambda module, args, out: counted.append(1))
    texts = [["red car", "two dogs"], ["a bus"]]
    known = available(structure(any_adapter))
    methods = [name for name in ("gradcam", "gradcam_ln", "rollout", "attention") if name in known]
    any_adapter.prepare_images([image])  # grids of convolutional networks are measured once, by a pass on a blank image
    counted.clear()
    explain(any_adapter, [image, noise(40, 40)], texts, methods=methods)
    # At layers without a shortcut the backward rule needs another pass, through the vision stack if they are in it.
    assert len(counted) == (
        1 if shortcut(any_adapter) or structure(any_adapter).axis(default_layer(any_adapter)) == "text" else 2
    )
    counted.clear()
    methods = ["gradcam", "hirescam", "rollout", "relevance", "gradient_rollout", "attention"]
    explain(any_adapter, [image, noise(40, 40)], texts, methods=[name for name in methods if name in known])
    handle.remove()
    # Generation needs one pass of the vision stack; gradients inside the vision stack need another one.
    assert len(counted) == 1 + any_adapter.generates


def test_shift_gradient_equals_finite_differences(any_adapter):
    inputs, targets = prepared(any_adapter)
    layer = default_layer(any_adapter)
    width = activations(any_adapter, inputs).shape[-1]
    direction = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-5 * direction.repeat(len(targets), 1)
    with torch.no_grad():
        slope = (
            any_adapter.score_from(layer, inputs, targets, step) - any_adapter.score_from(layer, inputs, targets, -step)
        ) / 2e-5
    plan = plan_methods(any_adapter, Request(["gradcam"]))
    found = torch.cat(
        [
            chunk.trace.at(layer, frozenset({"shift"})).shift() @ direction
            for chunk in run_passes(any_adapter, inputs, targets, plan)
        ]
    )
    assert close(found, slope.detach(), SLOPE)


def test_list_layers_marks_live_and_dead_layers(any_adapter, image):
    layers = {layer.path: layer for layer in list_layers(any_adapter, image, CAPTION)}
    assert sum(layer.default for layer in layers.values()) == 1
    assert next(layer for layer in layers.values() if layer.default).live
    for layer in layers.values():
        if layer.live:
            explain(any_adapter, image, CAPTION, methods=["gradcam"], layers=[layer.path])
        else:
            with pytest.raises(LayerError, match="dead"):
                explain(any_adapter, image, CAPTION, methods=["gradcam"], layers=[layer.path])


def test_wrong_targets_name_what_there_is(any_adapter, image):
    kind, known = any_adapter.target_kinds[0], any_adapter.token_targets
    with pytest.raises(TargetError, match=f"no target '{kind}s'; did you mean '{kind}'"):
        explain(any_adapter, image, CAPTION, target=f"{kind}s")
    with pytest.raises(TargetError, match=f"it has: {', '.join(known) or 'none, each token has its own score'}"):
        explain(any_adapter, image, CAPTION, token_target="left")


def test_text_independent_maps_are_stored_once_with_a_warning(any_adapter, image):
    if structure(any_adapter).text_stacks:
        found = explain(any_adapter, image, CAPTION, methods=["rollout"])
        assert found.methods["rollout"].maps.shape[0] == len(found.entries)
        assert not any("does not depend on the text" in w for w in found.warnings)
        return
    found = explain(any_adapter, image, CAPTION)
    if "rollout" not in available(structure(any_adapter)):
        assert list(found.methods) == ["gradcam"]
        return
    assert found.methods["rollout"].maps.shape[0] == 1
    assert not found.methods["rollout"].text_conditioned
    assert found.methods["gradcam"].maps.shape[0] == len(found.entries)
    assert any("does not depend on the" in w for w in found.warnings)
    other = explain(any_adapter, image, "two dogs", methods=["rollout"])
    assert np.array_equal(found.methods["rollout"].maps, other.methods["rollout"].maps)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_texts_are_refused(any_adapter, image, text):
    with pytest.raises(TextError, match="empty"):
        explain(any_adapter, image, text)


def test_a_misspelt_stack_is_refused():
    with pytest.raises(ModelError, match="unknown stack 'vison'; did you mean 'vision'"):
        ModelStructure({"vison": Stack(())}, "blocks.1", "mean", 0)
