"""Plan the method calls of a request before the model runs, so that a wrong name or option costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from grounding.adapter.base import Adapter
from grounding.core.errors import LayerError, OptionError, UnknownNameError
from grounding.engine.request import DEFAULT, Request
from grounding.methods import METHODS
from grounding.methods.base import Method
from grounding.methods.trace import LAYER_SIGNALS, Trace


@dataclass(frozen=True)
class MethodCall:
    """One method with its options at its layers: one column of a figure, one key in every file."""

    key: str
    name: str
    method: Method
    options: Mapping[str, Any]
    layer: str | None = None
    paths: tuple[str, ...] = ()

    def maps(self, trace: Trace) -> Float[np.ndarray, "k rows columns"]:
        """Raw maps of a chunk of targets; those of several layers are joined."""
        options = {k: v for k, v in self.options.items() if k in self.method.own_options}
        if not self.paths:
            return self.method(trace.at(None, self.method.needs), **options).cpu().numpy()
        layers = [self.method(trace.at(path, self.method.needs), **options).cpu().numpy() for path in self.paths]
        if len({maps.shape for maps in layers}) > 1:
            sizes = ", ".join(f"{path} {m.shape[1]} x {m.shape[2]}" for path, m in zip(self.paths, layers, strict=True))
            raise LayerError(f"layers of different grids cannot be averaged ({sizes}): request one map each")
        return layers[0] if len(layers) == 1 else join_layers(layers)


def for_target(adapter: Adapter, request: Request) -> tuple[Adapter, Request]:
    """The adapter for the request's kind of target, and the request without the options of that target.

    Raises TargetError, OptionError.
    """
    own = {key: value for key, value in request.options.items() if key.partition(".")[0] in adapter.kinds}
    rest = {key: value for key, value in request.options.items() if key not in own}
    return adapter.aimed(request.target, own), replace(request, options=rest)


def plan_methods(adapter: Adapter, request: Request) -> tuple[MethodCall, ...]:
    """The method calls of a request; the name "default" means the default methods of the architecture.

    Raises UnknownNameError, LayerError, OptionError; the last also for an option of a method that is not requested.
    """
    usual = [name for name in adapter.default_methods if not _missing(adapter, METHODS[name], METHODS[name].defaults)]
    names = list(
        dict.fromkeys(n for name in request.methods or [DEFAULT] for n in (usual if name == DEFAULT else [name]))
    )
    given = request.options_by_method()
    _check_options(request, names)
    if request.layers and not any(METHODS[name].reads_layer for name in names):
        raise OptionError(f"a layer was given, but none of {', '.join(names)} is computed at a layer")
    paths = _paths_of(adapter, request.layers)
    if request.average_layers and len(paths) < 2:
        raise OptionError(f"averaging needs at least two different layers, got {len(paths)}")
    made: list[MethodCall] = []
    for name in names:
        method: Method = METHODS[name]
        chosen = method.options(given.get(name, {}), name)
        if not method.reads_layer:
            made.append(MethodCall(name, name, method, chosen))
            continue
        if request.average_layers:
            key = f"{name}@{'+'.join(paths)}"
            made.append(
                MethodCall(key, name, method, chosen, "mean of " + ", ".join(paths.values()), tuple(paths.values()))
            )
            continue
        for layer, path in paths.items():
            key = f"{name}@{layer}" if len(paths) > 1 else name
            made.append(MethodCall(key, name, method, chosen, path, (path,)))
    _check_stacks(adapter, made)
    return tuple(made)


def _paths_of(adapter: Adapter, layers: Sequence[str | int]) -> dict[str, str]:
    """Name as given -> path; a layer named twice, in whatever form, counts once."""
    paths: dict[str, str] = {}
    for layer in map(str, layers or [""]):
        path = adapter.resolve(layer or None)
        if path not in paths.values():
            paths[layer] = path
    return paths


def wanted_signals(adapter: Adapter, calls: Sequence[MethodCall]) -> tuple[dict[str, bool], dict[str, bool]]:
    """Layers and attention modules to record -> whether their gradient is needed: the union over all method calls."""
    layers: dict[str, bool] = {}
    attention: dict[str, bool] = {}
    for call in calls:
        needs = call.method.needs
        gradient = bool(needs & (LAYER_SIGNALS - {"activations"}))
        layers |= {path: layers.get(path, False) or gradient for path in call.paths}
        for stack, reading in call.method.reads(call.options, adapter.structure).items():
            for path in adapter.structure.stack(stack).attention[reading.blocks]:
                attention[path] = attention.get(path, False) or reading.gradient
    return layers, attention


def available(adapter: Adapter) -> tuple[str, ...]:
    """The names of all methods that this architecture has the attention for."""
    return tuple(name for name in METHODS if not _missing(adapter, METHODS[name], METHODS[name].defaults))


def _missing(adapter: Adapter, method: Method, options: Mapping[str, Any]) -> list[str]:
    return [stack for stack in method.reads(options, adapter.structure) if not adapter.structure.attention(stack)]


def _check_stacks(adapter: Adapter, made: Sequence[MethodCall]) -> None:
    """Raises OptionError for a method that reads attention the architecture does not have."""
    for call in made:
        if missing := _missing(adapter, call.method, call.options):
            why = f": {adapter.structure.unrecorded}" if missing[0] in adapter.structure.stacks else ""
            raise OptionError(
                f"method {call.name!r} reads {missing[0]} attention, which {adapter.info.type} does not have{why} "
                f"(methods it has: {', '.join(available(adapter))})"
            )


def _check_options(request: Request, names: Sequence[str]) -> None:
    """Raises UnknownNameError, OptionError for options of methods that do not exist or are not requested."""
    for key in request.options:
        name = key.partition(".")[0]
        if name not in METHODS:
            raise UnknownNameError(f"option {key!r}: no method {name!r} (there are: {', '.join(METHODS)})")
        if name not in names:
            raise OptionError(f"option {key!r}: method {name!r} is not requested (requested: {', '.join(names)})")


def join_layers(layers: Sequence[Float[np.ndarray, "k rows columns"]]) -> Float[np.ndarray, "k rows columns"]:
    """The mean over layers, each map divided by its largest absolute value first: layers differ in size by orders."""
    sizes = [np.abs(maps).max((1, 2), keepdims=True) for maps in layers]
    return np.mean([maps / np.where(size > 0, size, 1) for maps, size in zip(layers, sizes, strict=True)], axis=0)
