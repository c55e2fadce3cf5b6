"""What a method is: one function from a trace to raw patch maps, with what it needs and which options it has."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from grounding.adapter.structure import ModelStructure
from grounding.core.errors import OptionError
from grounding.core.registry import did_you_mean
from grounding.methods.options import THRESHOLD, Fraction, convert
from grounding.methods.trace import GRADIENT_SIGNALS, LAYER_SIGNALS, SIGNALS, Trace


@dataclass(frozen=True)
class Reading:
    """The blocks of a stack whose attention weights a method reads, and whether it reads their gradients."""

    blocks: slice = field(default_factory=lambda: slice(None))
    gradient: bool = False


# From a method's options and the sites of an architecture: stack -> what is read of it.
Reads = Callable[[Mapping[str, Any], ModelStructure], Mapping[str, Reading]]


def nothing(_options: Mapping[str, Any], _structure: ModelStructure) -> Mapping[str, Reading]:
    """Of a method that reads no attention."""
    return {}


@dataclass(frozen=True)
class Method:
    """`function(trace, **options) -> (k, rows, columns)`, the raw map, before any ReLU where the formula ends in one.

    `needs` are the signals it reads (see `grounding.trace`), `signed` says that raw values may be negative and that
    the view keeps the positive part. Options are the function's keyword-only arguments; a signed method has
    `threshold` besides (default 0: ReLU), a matter of the view that never changes what is stored. `rule` names a
    backward rule (see `grounding.recorder`): it changes gradients, so it makes a method of its own. `reads` says
    which blocks of which stacks it reads the attention of: gradients go no further back than they must. `inner`: its
    map is <features, gradient> itself, patch by patch, which is nothing where the two are at right angles.
    """

    title: str
    needs: frozenset[str]
    signed: bool
    function: Callable[..., Tensor]
    rule: str | None = None
    reads: Reads = nothing
    inner: bool = False

    def __call__(self, trace: Trace, **options: Any) -> Tensor:
        """The raw maps (k, rows, columns) of a trace."""
        return self.function(trace, **options)

    @property
    def reads_layer(self) -> bool:
        """Whether it is computed at a layer."""
        return bool(self.needs & LAYER_SIGNALS)

    @property
    def reads_gradient(self) -> bool:
        """Whether it depends on the score at all."""
        return bool(self.needs & GRADIENT_SIGNALS)

    @cached_property
    def own_options(self) -> dict[str, Any]:
        """Option -> default, of the function itself."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def defaults(self) -> dict[str, Any]:
        """Option -> default, those of the view included."""
        return self.own_options | ({THRESHOLD: 0.0} if self.signed else {})

    def options(self, given: Mapping[str, Any], name: str) -> dict[str, Any]:
        """All options with the given values in place; texts are converted. Raises OptionError."""
        unknown = next((key for key in given if key not in self.defaults), None)
        if unknown is not None:
            known = list(self.defaults)
            raise OptionError(
                f"method {name!r} has no option {unknown!r}{did_you_mean(unknown, known)} "
                f"(it has: {', '.join(known) or 'none'})"
            )
        return self.defaults | {key: self._convert(f"{name}.{key}", key, value) for key, value in given.items()}

    def _convert(self, label: str, key: str, value: Any) -> Any:
        hints = typing.get_type_hints(self.function, include_extras=True) | {THRESHOLD: Fraction}
        hint = hints[key]
        try:
            return convert(value, hint)
        except ValueError as error:
            raise OptionError(f"option {label}: {error}") from None


def method(
    title: str,
    needs: set[str],
    *,
    signed: bool = False,
    rule: str | None = None,
    reads: Reads = nothing,
    inner: bool = False,
) -> Callable[[Callable[..., Tensor]], Method]:
    """Mark a function as a method. `needs`: the signals it reads; `rule`, `reads`, `inner`: as in `Method`."""
    if unknown := needs - SIGNALS:
        raise ValueError(f"unknown signals {sorted(unknown)} (there are: {', '.join(sorted(SIGNALS))})")
    return lambda function: Method(title, frozenset(needs), signed, function, rule, reads, inner)
