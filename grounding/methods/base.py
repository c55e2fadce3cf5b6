"""Definition of an explanation method: a function from a Trace to raw patch maps, its signals and its options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from grounding.adapter.layernorm import LAYERNORM_RULE
from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import OptionError
from grounding.core.registry import did_you_mean
from grounding.methods.masks import MakeMasks
from grounding.methods.options import NORM_RULE, THRESHOLD, Fraction, NormRule, convert
from grounding.methods.trace import GRADIENT_SIGNALS, LAYER_SIGNALS, SCORE_SIGNALS, SIGNALS, Trace


@dataclass(frozen=True)
class Reading:
    """Blocks of a stack whose attention weights a method reads, and whether it reads their gradients.

    With a `readout` the gradients are not those of the score but, block by block, of the score with the output of that
    block in place of the last: pooled by the model (`own`), or after all its tokens were replaced by their `mean`.
    """

    blocks: slice = field(default_factory=lambda: slice(None))
    gradient: bool = False
    readout: Literal["", "own", "mean"] = ""


class NoAttentionError(OptionError):
    """The model has no attention of the kind that a method reads; the message is that kind."""


# From a method's options and the structure of a model: stack -> the attention that is read. Raises NoAttentionError.
Reads = Callable[[Mapping[str, Any], ModelStructure], Mapping[str, Reading]]


def nothing(_options: Mapping[str, Any], _structure: ModelStructure) -> Mapping[str, Reading]:
    """The `reads` of methods that read no attention."""
    return {}


def whole_path(structure: ModelStructure) -> tuple[Hop, ...]:
    """Return the hops from the score to the patches. Raises NoAttentionError if no attention leads there."""
    if not structure.path:
        raise NoAttentionError("vision attention")
    return structure.path


@dataclass(frozen=True)
class Method:
    """A method: `function(trace, **options)` returns raw maps (k, rows, columns), before a final ReLU of the formula.

    Parameters
    ----------
    title: name in figures and reports.
    needs: the signals that the function reads, of `grounding.methods.trace.SIGNALS`.
    signed: raw values may be negative; the view shows the part above the option `threshold` (default 0: ReLU), which
        never changes what is stored.
    function: its keyword-only arguments are the options of the method, their annotations the valid values.
    rule: the backward rule of a method that is defined by it, see `grounding.adapter.layernorm`. All other methods that
        read a gradient have the option `norm_rule` (`none`, `detach`).
    reads: the blocks of each stack whose attention is read, from options and model structure. The backward pass ends at
        the first block whose gradient is read.
    inner: the map is the inner product of features and gradient at each patch, which is rounding where the two are
        orthogonal.
    masks: of a method that reads the signal `rescoring`, what it hides from the model.
    """

    title: str
    needs: frozenset[str]
    signed: bool
    function: Callable[..., Tensor]
    rule: str | None = None
    reads: Reads = nothing
    inner: bool = False
    masks: MakeMasks | None = None

    def __call__(self, trace: Trace, **options: Any) -> Tensor:
        """The raw maps (k, rows, columns) of a trace."""
        return self.function(trace, **options)

    @property
    def reads_layer(self) -> bool:
        """Whether the method is computed at a layer."""
        return bool(self.needs & LAYER_SIGNALS)

    @property
    def reads_gradient(self) -> bool:
        """Whether the method reads a gradient."""
        return bool(self.needs & GRADIENT_SIGNALS)

    @property
    def reads_score(self) -> bool:
        """Whether the maps depend on the score: through a gradient, or through scores of altered images."""
        return bool(self.needs & SCORE_SIGNALS)

    def backward_rule(self, options: Mapping[str, Any]) -> str | None:
        """Return the backward rule of the gradients that the method reads under these options, None if there is
        none."""
        return LAYERNORM_RULE if options.get(NORM_RULE) == "detach" else self.rule

    @cached_property
    def own_options(self) -> dict[str, Any]:
        """Option -> default, without those of the view."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def defaults(self) -> dict[str, Any]:
        """Option -> default, including those of the view and of the backward pass."""
        ruled: dict[str, Any] = {NORM_RULE: "none"} if self.reads_gradient and self.rule is None else {}
        return self.own_options | ruled | ({THRESHOLD: 0.0} if self.signed else {})

    def options(self, given: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return all options: defaults updated by the `given` values, texts converted. Raises OptionError."""
        unknown = next((key for key in given if key not in self.defaults), None)
        if unknown is not None:
            known = list(self.defaults)
            raise OptionError(
                f"method {name!r} has no option {unknown!r}{did_you_mean(unknown, known)} "
                f"(it has: {', '.join(known) or 'none'})"
            )
        return self.defaults | {key: self._convert(f"{name}.{key}", key, value) for key, value in given.items()}

    def _convert(self, label: str, key: str, value: Any) -> Any:
        hints = typing.get_type_hints(self.function, include_extras=True) | {THRESHOLD: Fraction, NORM_RULE: NormRule}
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
    masks: MakeMasks | None = None,
) -> Callable[[Callable[..., Tensor]], Method]:
    """Decorator that makes a `Method` of a function; see `Method` for the parameters.

    Raises ValueError for unknown signals, and for the signal `rescoring` without `masks`.
    """
    if ("rescoring" in needs) != (masks is not None):
        raise ValueError("the signal 'rescoring' and the parameter masks belong together")
    if unknown := needs - SIGNALS:
        raise ValueError(f"unknown signals {sorted(unknown)} (there are: {', '.join(sorted(SIGNALS))})")
    return lambda function: Method(title, frozenset(needs), signed, function, rule, reads, inner, masks)
