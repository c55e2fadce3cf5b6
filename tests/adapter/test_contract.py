"""The adapter contract, over every architecture of the table and one of a third party."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import adapters
from adapters import ADAPTERS
from grounding import explain
from grounding.adapter.structure import Hop, ModelStructure, Stack
from grounding.core.errors import LayerError, ModelError, TargetError, TextError
from grounding.engine.layers import list_layers
from grounding.engine.passes import run_passes
from grounding.engine.plan import available, plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request
from grounding.engine.signals import activations, attentions, pooled_gradient
from grounding.testing import check_adapter
from tests.support import models
from tests.support.contract import all_targets, default_layer, grid, shortcut, structure
from tests.support.images import noise
from tests.support.tolerances import close

CAPTION = "a man in a red jacket"
TEXTS = [["a man in a red jacket", "two dogs"], ["red car"]]


def prepared(adapter, captions=(CAPTION,)):
    inputs = prepare(adapter, [noise(90, 60)], [list(captions)])
    return inputs, all_targets(adapter, inputs)


def pooled(adapter, inputs, targets, layer):
    """The pooled gradient (K, D) by the engine."""
    plan = plan_methods(adapter, Request(["gradcam"], layers=[layer]))
    found = {}
    for chunk in run_passes(adapter, inputs, targets, plan):
        own = chunk.trace.at(layer, frozenset({"pooled_gradient"})).pooled_gradient()
        found |= dict(zip(chunk.members, own, strict=True))
    return torch.stack([found[k] for k in range(len(targets))])


def test_every_architecture_in_the_table_is_tested():
    assert set(ADAPTERS) <= set(models.FACTORIES)


def test_every_adapter_in_the_folder_is_in_the_table():
    """Fails while the line of an adapter is missing in the table."""
    targets = {ADAPTERS.target(name) for name in ADAPTERS}
    found = []
    folder = Path(adapters.__file__).parent
    for path in (path for path in folder.rglob("*.py") if path.parent.name != "shared"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(
                name.endswith(("Adapter", "DualEncoder"))
                for name in (node.name, *(b.id for b in node.bases if isinstance(b, ast.Name)))
            ):
                module = ".".join(path.relative_to(Path(adapters.__file__).parents[1]).with_suffix("").parts)
                assert f"{module}:{node.name}" in targets
                found.append(module)
    assert len(found) >= 5, found


@pytest.mark.parametrize("name", sorted(models.FACTORIES))
def test_adapters_meet_the_contract(name):
    """For all kinds of targets; a factory of another default kind, for that alone."""
    adapter = models.FACTORIES[name]()
    of_kind = {k for k in adapter.target_kinds if name.endswith(f" {k}")}
    check_adapter(adapter, [noise(90, 60), noise(50, 70, 3)], TEXTS, kinds=sorted(of_kind) or None)


def test_activations_and_attentions_are_uniform(any_adapter):
    inputs, _ = prepared(any_adapter)
    rows, columns = grid(inputs)
    assert activations(any_adapter, inputs).shape[:3] == (1, rows, columns)
    if not structure(any_adapter).stacks["vision"].attention:
        with pytest.raises(ModelError, match=r"no attention of .* can be recorded: its? "):
            attentions(any_adapter, inputs)
        return
    recorded = attentions(any_adapter, inputs)
    assert len(recorded) == len(structure(any_adapter).stacks["vision"].blocks)
    pixels = inputs.images.tensors["pixel_values"]  # (B, slots, D) where patches are padded to a number of slots
    tokens = pixels.shape[1] if pixels.ndim == 3 else structure(any_adapter).prefix + rows * columns
    for weights in recorded:
        assert weights.shape[2:] == (tokens, tokens)
        assert weights.sum(-1).numpy() == pytest.approx(1)


def test_pooled_gradient_equals_the_slow_reference(any_adapter):
    """The pooled gradient of the engine equals the gradient by one vector that is added to all patches."""
    inputs, targets = prepared(any_adapter)
    own = structure(any_adapter)
    for name in (None, "0", "-1.in" if own.stacks["vision"].inputs else "-1"):
        layer = own.find_layer(any_adapter.model, name)
        expected = pooled_gradient(any_adapter, inputs, targets, layer)
        assert close(pooled(any_adapter, inputs, targets, layer), expected)


def test_one_forward_pass_for_all_methods(any_adapter, image):
    known = available(structure(any_adapter))
    images, texts = [image, noise(40, 40)], [["red car", "two dogs"], ["a bus"]]
    few = [name for name in ("gradcam", "gradcam_ln", "rollout", "attention") if name in known]
    many = ["gradcam", "hirescam", "rollout", "relevance", "gradient_rollout", "attention"]
    many = [name for name in many if name in known]
    for methods in (few, many):  # the first recorded pass is compared with a plain one
        explain(any_adapter, image, "red car", methods=methods)
    counted = []
    first = any_adapter.model.get_submodule(structure(any_adapter).stacks["vision"].blocks[0])
    handle = first.register_forward_hook(lambda module, args, out: counted.append(1))
    explain(any_adapter, images, texts, methods=few)
    # At layers without a shortcut the backward rule needs another pass, through the vision stack if they are in it.
    on_text = structure(any_adapter).items(default_layer(any_adapter)) == "sequence"
    assert len(counted) == (1 if shortcut(any_adapter) or on_text else 2)
    counted.clear()
    explain(any_adapter, images, texts, methods=many)
    handle.remove()
    # Generation needs one pass of the vision stack; gradients inside the vision stack need another one.
    assert len(counted) == 1 + any_adapter.generates


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
    with pytest.raises(TargetError, match=f"no target '{kind}z'; did you mean '{kind}'"):
        explain(any_adapter, image, CAPTION, target=f"{kind}z")
    with pytest.raises(TargetError, match=f"it has: {', '.join(known) or 'none, each token has its own score'}"):
        explain(any_adapter, image, CAPTION, token_target="left")


def test_text_independent_maps_are_stored_once_with_a_warning(any_adapter, image):
    if structure(any_adapter).reads_sequence:
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


def test_a_path_through_an_unknown_stack_is_refused():
    with pytest.raises(ModelError, match=r"the path goes through a stack 'vison' \(there are: vision\)"):
        ModelStructure({"vision": Stack(())}, "blocks.1", "mean", path=(Hop("vison"),))
    with pytest.raises(ModelError, match=r"unknown pooling 'average' \(known: cls, mean,"):
        ModelStructure({"vision": Stack(())}, "blocks.1", "average")
