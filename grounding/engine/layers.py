"""List the layers of a model whose output is a patch grid, found by running it once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import Layer
from grounding.core.errors import LayerError
from grounding.engine.passes import run_passes
from grounding.engine.plan import MethodCall
from grounding.methods.base import Method


def list_layers(adapter: Adapter, image: Any, text: Any = None, target: Any = None) -> tuple[Layer, ...]:
    """All layers whose output is a patch grid, in the order they run, tried on one image, one text (None: any) and one
    kind of target. Raises GroundingError for an unusable image, text or target."""
    target, text = adapter.asked_by(target, text)
    adapter = adapter.aimed(target)
    inputs = adapter.prepare([image], [[adapter.sample_text if text is None else adapter.asked(text)]])
    targets = adapter.targets(inputs, [[inputs.tokens[0].caption()]], target)
    shapes = _foldable(adapter, inputs, targets)
    recording = Method("", frozenset({"patch_gradient"}), True, lambda trace: trace.patch_gradient())
    call = MethodCall("", "", recording, {}, paths=tuple(shapes))
    [chunk] = run_passes(adapter, inputs, targets, [call])
    aliases = adapter.structure.aliases()
    grid = adapter.grid(inputs)
    return tuple(
        Layer(
            path,
            shape,
            bool(adapter.to_grid(chunk.trace.gradients[path], grid, path).any()),
            path == adapter.structure.layer,
            aliases.get(path, ""),
        )
        for path, shape in shapes.items()
    )


def _foldable(adapter: Adapter, inputs: Inputs, targets: Targets) -> dict[str, tuple[int, ...]]:
    """Path -> output shape of every module that ran once and whose output is a patch grid."""
    found: dict[str, tuple[int, ...]] = {}
    ran: Counter[str] = Counter()
    grid = adapter.grid(inputs)

    def look(path: str, output: Any) -> None:
        ran[path] += 1  # whatever it gives: one of several outputs may be no patch grid
        tensor = output[0] if isinstance(output, tuple) and output else output
        with contextlib.suppress(LayerError):
            if isinstance(tensor, Tensor) and adapter.to_grid(tensor, grid, path) is not None:
                found[path] = tuple(tensor.shape)

    with Recorder(adapter.model), contextlib.ExitStack() as hooks:
        for path, module in _modules(adapter.model):
            handle = module.register_forward_hook(lambda _m, _a, out, p=path: look(p, out))
            hooks.callback(handle.remove)
        adapter.forward(inputs, targets)
    return {path: shape for path, shape in found.items() if ran[path] == 1}


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in model.named_modules() if path)
