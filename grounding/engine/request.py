"""What to compute for images and texts: methods, entries, target, layers, options, seed; validated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grounding.core.errors import OptionError
from grounding.engine.selection import Selection
from grounding.methods import METHODS

# Among the names of methods: the default methods of the architecture.
DEFAULT = "default"
SEED = 0
BATCH_SIZE = 8


@dataclass(frozen=True)
class Request:
    """What to compute for every image and text of a call, a command or a batch run.

    Parameters
    ----------
    methods: names in `grounding.METHODS`, or "default"; None: the default of whoever computes.
    select: the entries of each text that are explained.
    target: one of `Adapter.kinds`, or classes; None: the default of the architecture.
    token_target: how a part of a caption is scored, one of `Adapter.token_targets`; None: the default.
    layers: layers of the methods that are computed at one, as `Adapter.resolve` takes them.
    average_layers: join several layers into one map.
    options: "method.option" -> value; likewise "target.option" where a target has options.
    seed: seed of everything that is drawn at random.

    Raises UnknownNameError for an unknown method, OptionError for an option that names no method.
    """

    methods: Sequence[str] | None = None
    select: Selection = field(default_factory=Selection)
    target: Any = None
    token_target: str | None = None
    layers: Sequence[str | int] = ()
    average_layers: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = SEED

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        # A name alone means a list of one; an empty list of methods means the default.
        methods = (self.methods,) if isinstance(self.methods, str) else tuple(self.methods or ())
        methods = tuple(map(METHODS.canonical, methods))
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        set_field(self, "methods", methods or None)
        set_field(self, "layers", tuple(map(str, layers)))
        set_field(self, "options", {_canonical(key): value for key, value in self.options.items()})
        for name in self.methods or ():
            if name != DEFAULT:
                METHODS.target(name)
        for key in self.options:
            name, dot, option = key.partition(".")
            if not (name and dot and option):
                raise OptionError(f"option {key!r}: expected method.option=value, e.g. gradcam.threshold=0.1")

    def options_by_method(self) -> dict[str, dict[str, Any]]:
        """Method -> option -> value."""
        split: dict[str, dict[str, Any]] = {}
        for key, value in self.options.items():
            name, _, option = key.partition(".")
            split.setdefault(name, {})[option] = value
        return split


def _canonical(key: str) -> str:
    """An option "method.option" with the listed name of its method."""
    name, dot, option = str(key).partition(".")
    return f"{METHODS.canonical(name)}{dot}{option}"
