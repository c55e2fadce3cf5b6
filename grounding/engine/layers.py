"""List the layers of a model whose output is a patch grid, found by running it once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import Layer
from grounding.core.errors import LayerError
from grounding.core.text import Query
from grounding.engine.passes import run_passes
from grounding.engine.plan import MethodCall, plan_of
from grounding.engine.queries import check_query, prepare_inputs, split_target
from grounding.methods.base import Method


def list_layers(adapter: Adapter, image: Any, text: Any = None, target: Any = None) -> tuple[Layer, ...]:
    """All layers whose output is a patch grid, in the order they run, tried on one image, one text (None: any) and one
    kind of target. Raises GroundingError for an unusable image, text or target."""
    kind, text = split_target(adapter, target, text)
    kind, _ = adapter.check_target(kind)
    structure = adapter.structure(kind)
    query = adapter.sample if text is None else check_query(adapter, text, kind)
    query = query if kind not in adapter.text_independent else Query(None)
    inputs = prepare_inputs(adapter, adapter.prepare_images([image]), [[query]])
    targets = adapter.targets(inputs, [[inputs.texts[0].caption()]], kind)
    shapes = _foldable(adapter, inputs, targets)
    recording = Method("", frozenset({"patch_gradient"}), True, lambda trace: trace.patch_gradient())
    call = MethodCall("", "", recording, {}, paths=tuple(shapes))
    [chunk] = run_passes(adapter, inputs, targets, replace(plan_of(adapter, kind), calls=(call,), shortcut=None))
    aliases = structure.aliases()
    sizes = chunk.trace.gradient_sizes()
    return tuple(
        Layer(path, shape, sizes[path] > 0, path == structure.default_layer, aliases.get(path, ""))
        for path, shape in shapes.items()
    )


def _foldable(adapter: Adapter, inputs: Inputs, targets: Targets) -> dict[str, tuple[int, ...]]:
    """Path -> output shape of every module that ran once and whose output is a patch grid."""
    found: dict[str, tuple[int, ...]] = {}
    ran: Counter[str] = Counter()

    def look(path: str, output: Any) -> None:
        ran[path] += 1  # whatever it gives: one of several outputs may be no patch grid
        tensor = output[0] if isinstance(output, tuple) and output else output
        with contextlib.suppress(LayerError):
            if isinstance(tensor, Tensor) and adapter.patch_tokens(path, inputs, tuple(tensor.shape)):
                found[path] = tuple(tensor.shape)

    with Recorder(adapter.model), contextlib.ExitStack() as hooks:
        for path, module in _modules(adapter.model):
            handle = module.register_forward_hook(lambda _m, _a, out, p=path: look(p, out))
            hooks.callback(handle.remove)
        adapter.forward(inputs, targets)
    return {path: shape for path, shape in found.items() if ran[path] == 1}


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in model.named_modules() if path)
