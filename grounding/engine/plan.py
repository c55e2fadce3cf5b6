"""Plan the method calls of a request before the model runs, so that a wrong name or option costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from grounding.adapter.base import Adapter, Shortcut
from grounding.adapter.inputs import DETAIL
from grounding.adapter.structure import ModelStructure
from grounding.core.errors import LayerError, OptionError, UnknownNameError
from grounding.engine.request import DEFAULT, SEED, Request
from grounding.methods import METHODS
from grounding.methods.base import Method, NoAttentionError
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

    @property
    def rule(self) -> str | None:
        """The backward rule of the gradients that are read."""
        return self.method.backward_rule(self.options)

    def maps(self, trace: Trace, view: str = DETAIL) -> list[Float[np.ndarray, "rows columns"] | None]:
        """One raw map per target of a chunk, in one view of its image; None where the image has no such view.

        Those of several layers are joined.
        """
        options = {k: v for k, v in self.options.items() if k in self.method.own_options}
        layers = [self._maps_at(trace, path, options, view) for path in self.paths or (None,)]
        if len(layers) == 1:
            return layers[0]
        return [None if maps[0] is None else self._joined(maps) for maps in zip(*layers, strict=True)]

    def _maps_at(
        self, trace: Trace, path: str | None, options: Mapping[str, Any], view: str
    ) -> list[Float[np.ndarray, "rows columns"] | None]:
        """Maps at one layer. A method gets targets of the same patch grid at a time."""
        at = trace.at(path, self.method.needs, view)
        found: list[np.ndarray | None] = [None] * len(trace.targets)
        for members in at.by_grid().values():
            own = self.method(at.with_pooled(members), **options).cpu().numpy()
            for k, one in zip(members, own, strict=True):
                found[k] = one
        return found

    def _joined(self, layers: Sequence[Any]) -> Float[np.ndarray, "rows columns"]:
        if len({maps.shape for maps in layers}) > 1:
            sizes = ", ".join(f"{path} {m.shape[0]} x {m.shape[1]}" for path, m in zip(self.paths, layers, strict=True))
            raise LayerError(f"layers of different grids cannot be averaged ({sizes}): request one map each")
        return join_layers(layers)


@dataclass(frozen=True, eq=False)
class Plan:
    """The method calls of a request on one adapter, and what they read of its model.

    `kind` is the kind of target, `structure` that of the model for it, `shortcut` its closed form if it has one,
    `target_options` the options of this kind of target, `seed` that of everything that is drawn at random.
    """

    calls: tuple[MethodCall, ...]
    kind: str
    structure: ModelStructure
    shortcut: Shortcut | None
    target_options: Mapping[str, str] = field(default_factory=dict)
    seed: int = SEED

    def readout(self, call: MethodCall) -> str:
        """Return how single blocks are read out for a method call (`Reading.readout`); "" if they are not."""
        return next(
            (one.readout for one in call.method.reads(call.options, self.structure).values() if one.readout), ""
        )

    def query_keys(self, calls: Sequence[MethodCall]) -> set[str]:
        """Return the attention modules whose queries and keys the method calls read."""
        return set(self.signals([call for call in calls if "query_key" in call.method.needs])[1])

    def signals(self, calls: Sequence[MethodCall]) -> tuple[dict[str, bool], dict[str, bool]]:
        """Layers and attention modules to record -> whether their gradient is needed: the union over method calls."""
        layers: dict[str, bool] = {}
        attention: dict[str, bool] = {}
        for call in calls:
            gradient = bool(call.method.needs & (LAYER_SIGNALS - {"activations"}))
            layers |= {path: layers.get(path, False) or gradient for path in call.paths}
            for stack, reading in call.method.reads(call.options, self.structure).items():
                for path in self.structure.stack(stack).attention[reading.blocks]:
                    attention[path] = attention.get(path, False) or reading.gradient
        return layers, attention


def plan_of(adapter: Adapter, kind: str, calls: Sequence[MethodCall] = ()) -> Plan:
    """Return the plan of method calls for a kind of target."""
    return Plan(tuple(calls), kind, adapter.structure(kind), adapter.shortcut(kind))


def plan_methods(adapter: Adapter, request: Request) -> Plan:
    """The method calls of a request; the name "default" means the default methods of the architecture.

    Raises UnknownNameError, TargetError, LayerError, OptionError; the last also for an option of a method that is not
    requested.
    """
    kind, _ = adapter.check_target(request.target)
    target_options, options = split_options(adapter, kind, dict(request.options))
    request = replace(request, options=options)
    structure = adapter.structure(kind)
    usual = [name for name in adapter.default_methods if name in available(structure)]
    names = list(
        dict.fromkeys(n for name in request.methods or [DEFAULT] for n in (usual if name == DEFAULT else [name]))
    )
    given = request.options_by_method()
    _check_options(request, names)
    if request.layers and not any(METHODS[name].reads_layer for name in names):
        raise OptionError(f"a layer was given, but none of {', '.join(names)} is computed at a layer")
    paths = _paths_of(adapter, structure, request.layers)
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
    _check_attention(adapter, structure, made)
    return Plan(tuple(made), kind, structure, adapter.shortcut(kind), target_options, request.seed)


def _paths_of(adapter: Adapter, structure: ModelStructure, layers: Sequence[str | int]) -> dict[str, str]:
    """Name as given -> path; a layer named twice, in whatever form, counts once."""
    paths: dict[str, str] = {}
    for layer in map(str, layers or [""]):
        path = structure.find_layer(adapter.model, layer or None)
        if path not in paths.values():
            paths[layer] = path
    return paths


def available(structure: ModelStructure) -> tuple[str, ...]:
    """The names of all methods that a model has the attention for."""
    return tuple(name for name in METHODS if not _missing(structure, METHODS[name], METHODS[name].defaults))


def _missing(structure: ModelStructure, method: Method, options: Mapping[str, Any]) -> str:
    """The attention that a method reads and the model does not have, in words; "" if it has all."""
    try:
        stacks = method.reads(options, structure)
    except NoAttentionError as error:
        return str(error)
    return next((f"{stack} attention" for stack in stacks if not structure.stack(stack).attention), "")


def _check_attention(adapter: Adapter, structure: ModelStructure, made: Sequence[MethodCall]) -> None:
    """Raises OptionError for a method that reads attention the architecture does not have."""
    for call in made:
        if missing := _missing(structure, call.method, call.options):
            # The reason is about the image encoder.
            why = f": {structure.unrecorded}" if structure.unrecorded and missing == "vision attention" else ""
            raise OptionError(
                f"method {call.name!r} reads {missing}, which {adapter.info.type} does not have{why} "
                f"(methods it has: {', '.join(available(structure))})"
            )


def split_options(adapter: Adapter, kind: str, options: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the options of this kind of target, option -> value, and all others. Raises OptionError."""
    own: dict[str, str] = {}
    known = adapter.target_options
    for key in [key for key in options if key.partition(".")[0] in adapter.target_kinds]:
        name, _, option = key.partition(".")
        if key not in known:
            has = f"it has: {', '.join(known)}" if known else f"targets of {adapter.info.type} have no options"
            raise OptionError(f"option {key!r} does not exist ({has})")
        if options[key] not in known[key]:
            values = ", ".join(f"{value} (default)" if value == known[key][0] else value for value in known[key])
            raise OptionError(f"target option {key}={options[key]}: there is {key}, {values}")
        if name != kind:
            raise OptionError(f"option {key} belongs to the target {name}, not to {kind}")
        own[option] = options[key]
    return own, {key: value for key, value in options.items() if key.partition(".")[0] not in adapter.target_kinds}


def _check_options(request: Request, names: Sequence[str]) -> None:
    """Raises UnknownNameError, OptionError for options of methods that do not exist or are not requested."""
    for key in request.options:
        name = key.partition(".")[0]
        if name not in METHODS:
            raise UnknownNameError(f"option {key!r}: no method {name!r} (there are: {', '.join(METHODS)})")
        if name not in names:
            raise OptionError(f"option {key!r}: method {name!r} is not requested (requested: {', '.join(names)})")


def join_layers(layers: Sequence[Float[np.ndarray, "rows columns"]]) -> Float[np.ndarray, "rows columns"]:
    """The mean over layers, each map divided by its largest absolute value first: layers differ in size by orders."""
    sizes = [np.abs(maps).max() for maps in layers]
    return np.mean([maps / np.where(size > 0, size, 1) for maps, size in zip(layers, sizes, strict=True)], axis=0)
